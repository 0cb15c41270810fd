"""The command line: `selectune train|eval|verify|delta|tasks|methods|compare|demo|plan|bench|doctor`.

Results go to stdout, everything else to stderr. The files here import at their top only what `--help` needs. A command
imports torch and the like in its own first lines (tests/test_structure.py asserts that).

app        the tree of commands, and what every command has in common
commands/  the commands
options    options that several commands share
values     budgets and dtypes as text
settings   `--config FILE`
output     results, progress, log and errors
mistakes   the message about a wrong command line
exits      the exit codes
signals    Ctrl-C and SIGTERM
catalogue  the rows of `selectune methods` and `selectune tasks`, kept in methods.json and tasks.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits with a code of `selectune.cli.exits`."""
    from selectune.cli.signals import StoppedBySignal, exit_code, watch

    watch()
    try:
        _command(argv)
    except StoppedBySignal as stopped:
        sys.stderr.write(f"stopped: {stopped}\n")
        sys.exit(exit_code(stopped.signal))


def _command(argv: Sequence[str] | None) -> None:
    try:
        from selectune.cli.app import app
    except ImportError as error:  # of typer, rich or a file of our own: the installation is damaged
        sys.exit(
            f"error: The command line cannot start: {error}. Install it again: pip install --force-reinstall selectune."
        )
    app(args=None if argv is None else list(argv), prog_name="selectune")


__all__ = ["main"]
