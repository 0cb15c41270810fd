"""Ctrl-C and SIGTERM: the first signal ends the command in order, the second ends the process.

A run between its first and its last step finishes the step and saves a checkpoint. Anything else ends at once, through
every `finally`. The exit code is 128 + the signal's number, as a shell gives it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectune.runs.stop import Stop

AGAIN = 0.05
"""Seconds until a signal is sent again whose exception Python ignored, as it does in a finalizer."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StoppedBySignal(BaseException):
    """Ends whatever runs. Libraries do not handle it, as some handle KeyboardInterrupt."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal

    def __str__(self) -> str:
        return f"by {_NAMES[self.signal]}" + (f", {_state.stop.where}" if _state.stop is not None else "")


class _State:
    received: int | None = None
    raised: StoppedBySignal | None = None
    stop: Stop | None = None  # of the run, if one is going on
    hook: Any = sys.__unraisablehook__


_state = _State()


def watch() -> None:
    """Handles signals from here on. Call it in the main thread, as a command begins."""
    _state.received = _state.stop = _state.raised = None
    for number in SIGNALS:
        signal.signal(number, _received)
    if sys.unraisablehook is not _ignored:
        _state.hook, sys.unraisablehook = sys.unraisablehook, _ignored


def heed(stop: Stop) -> None:
    """Sends the first signal to this run while it listens."""
    _state.stop = stop


def swallowed() -> StoppedBySignal | None:
    """The exception of a signal, which a library may have taken for an error of its own (transformers' imports do)."""
    return _state.raised


def exit_code(number: int) -> int:
    return 128 + number


def _received(number: int, frame: Any) -> None:
    del frame
    if _state.received is not None:
        _say(f"stopped: at once, by a second {_NAMES[number]}.")
        os._exit(exit_code(number))
    _state.received = number
    stop = _state.stop
    if stop is None or not stop.listening:
        _state.raised = StoppedBySignal(number)
        raise _state.raised
    stop.ask(number)
    _say(f"{_NAMES[number]}: finishing the step, then saving a checkpoint; a second one stops at once.")


def _ignored(told: Any) -> None:
    """An exception was raised where none can leave; that of a signal is to be raised a moment later."""
    if _state.received is None or told.exc_value is not _state.raised:
        _state.hook(told)
        return
    again = threading.Timer(AGAIN, os.kill, (os.getpid(), _state.received))
    again.daemon = True
    _state.received = _state.raised = None
    again.start()


def _say(text: str) -> None:
    """Writes one line to stderr by a system call, because the signal may have interrupted a write."""
    try:
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
    except (OSError, ValueError):
        return  # the reader has gone
