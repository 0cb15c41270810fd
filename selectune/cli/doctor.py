"""`selectune doctor`: versions, devices, backends, and a proof that training and undoing it work here."""

from __future__ import annotations

import typer

from selectune.cli.options import Json
from selectune.cli.output import result, working

EXAMPLES = "Example:  selectune doctor --json\n\nExit codes: 0 the self-check holds, 1 it does not"


def doctor(as_json: Json = False) -> None:
    """Say what is installed, which kernels run and why, and check that training works and leaves no trace."""
    from selectune.bench.doctor import described, examine

    with working():
        found = examine()
    result(as_json, found, "\n".join(described(found)))
    if not found["ok"]:
        raise typer.Exit(1)
