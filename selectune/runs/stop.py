"""A wish to stop a run, told by a signal or by another thread, and looked at between steps."""

from __future__ import annotations

import signal


class Stop:
    """`ask()` it, and the run that was given it ends after its step with a checkpoint and StoppedError.

    `listening`: whether a run will look soon. Before and after its steps there is nothing to finish, and whoever asks
    may as well end the process; `where` says what becomes of the run then.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.listening = False
        self.where = "before its first step, so nothing is lost"

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def ask(self, signal: int = signal.SIGINT) -> None:
        """The run shall stop; `signal`: what asked, for whoever gives an exit code."""
        self.signal = signal
