"""The command line: `selectune train|eval|verify|delta|tasks|methods|demo|plan|bench|doctor`.

Results go to stdout, all else to stderr. The modules here import at their top what is needed to say `--help`; what a
command works with, torch first of all, it imports in its own first lines (tests/test_structure.py asserts that).
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
    except ImportError as error:  # typer or rich, or a file of our own: an installation that is not whole
        sys.exit(
            f"error: The command line cannot start: {error}. Install it again: pip install --force-reinstall selectune."
        )
    app(args=None if argv is None else list(argv), prog_name="selectune")


__all__ = ["main"]
