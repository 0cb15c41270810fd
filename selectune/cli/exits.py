"""The exit codes of all commands."""

from __future__ import annotations

from selectune.errors import ConfigError, SelectuneError

DONE, FAILED, WRONG, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

EXITS = {
    DONE: "done",
    FAILED: "it failed",
    WRONG: "usage error",
    INTERRUPTED: "stopped by Ctrl-C",
    TERMINATED: "stopped by SIGTERM",
}
TABLE = "Exit codes: " + ", ".join(f"{code} {what}" for code, what in EXITS.items()) + "."
"""The sentence in `--help` and README.md."""


def code_of(error: SelectuneError | OSError) -> int:
    """The exit code of an error.

    >>> from selectune.errors import BudgetError, TaskError
    >>> code_of(BudgetError()), code_of(TaskError())
    (2, 1)
    """
    return WRONG if isinstance(error, ConfigError) else FAILED
