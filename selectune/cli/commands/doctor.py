"""`selectune doctor`: versions, devices, backends, and a proof that training and undoing it work here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from selectune.cli.exits import FAILED
from selectune.cli.options import Json
from selectune.cli.output import refuse, result
from selectune.doctor import checks
from selectune.doctor import examine as examination

EXAMPLES = (
    "Examples:  selectune doctor\n\nselectune doctor --model ./my-model\n\n"
    "Exit codes: 0 all is well, 1 a part is not; it is named"
)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Also look at this model: what would be in scope, what would be left out, whether attach works.",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show everything that was found, on many lines.")] = False,
    as_json: Json = False,
) -> None:
    """Say what is installed, which kernels run and why, and check that training works and leaves no trace."""
    found, problem = checks.attempt(lambda: _told(model, verbose, as_json))
    if problem is not None:
        checks.attempt(lambda: refuse(f"doctor: {problem}", "SelectuneError", FAILED, as_json))  # stdout may be closed
    if problem is not None or not found:
        raise typer.Exit(FAILED)


def _told(model: str | None, verbose: bool, as_json: bool) -> bool:
    found = examination.examine(model)
    text = "\n".join(examination.described(found)) if verbose else examination.page(found)
    encoding = sys.stdout.encoding or "utf-8"
    result(as_json, found, text.encode(encoding, "backslashreplace").decode(encoding))
    return found["ok"]
