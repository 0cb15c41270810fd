"""`selectune doctor` examines the installation and proves that training and undoing it work here."""

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
    "Exit codes: 0 all is well, 1 there is a problem, which is named"
)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Also examine this model: what is in scope, what is left out, whether attach works.",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show everything that was found.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is installed and which kernels run, and check that training works and can be undone exactly."""
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
