"""A request to stop a run, by a signal or another thread. The run checks it between steps."""

from __future__ import annotations

import signal


class Stop:
    """After `ask()`, the run that has this object ends its step, writes a checkpoint and raises StoppedError.

    `listening`: True while the run takes steps. Before and after that there is nothing to finish, so the caller may end
    the process; `where` says what that means for the run.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.listening = False
        self.where = "before its first step, so nothing is lost"

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def ask(self, signal: int = signal.SIGINT) -> None:
        """Asks the run to stop. `signal` gives the exit code."""
        self.signal = signal
