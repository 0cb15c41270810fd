"""The command line: `selectune train|eval|verify|delta|tasks|methods|demo`. Results on stdout, all else on stderr."""

from __future__ import annotations

from collections.abc import Sequence

from selectune.cli.app import app


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 1 it could not be done, 2 it was asked wrongly."""
    app(args=None if argv is None else list(argv), prog_name="selectune")


__all__ = ["app", "main"]
