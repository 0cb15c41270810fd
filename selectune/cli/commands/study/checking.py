"""`selectune check theorem`: a claim of a paper, checked here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from selectune.cli.exits import FAILED
from selectune.cli.options import Json
from selectune.cli.output import result

app = typer.Typer(
    help="Check what the method's theory promises, on models that can be enumerated.", no_args_is_help=True
)


@app.callback()
def _group() -> None:
    """Keeps `theorem` a command of its own: typer would make a lone command the group's."""


@app.command(epilog="Example:  selectune check theorem --seeds 100")
def theorem(
    seeds: Annotated[int, typer.Option(min=1, help="Random models: each with three sizes of weights.")] = 20,
    as_json: Json = False,
) -> None:
    """Check Theorem 1 of ID3: sqrt(E[g^2]) >= E|g| >= E|g| / (|w| + eps)^exp, for eps >= 1 and exp >= 0."""
    from selectune.study.analysis.theorem import EPS, EXP, check_theorem

    found = check_theorem(seeds)
    example = found.example
    text = (
        f"{found.violations} violations among {found.counts:,} scalars of {seeds} softmax regressions in three sizes, "
        f"under eps {', '.join(f'{e:g}' for e in EPS)} and exp {', '.join(f'{x:g}' for x in EXP)}\n"
        f"|E[g]| under the model's own labels: at most {found.mean:.1e}\n"
        f"exp = -1 is outside the theorem: {found.negative:,} of the {found.counts:,} scalars violate it. By hand: "
        f"w = {example['w']:g}, eps = {example['eps']:g}, g = 1 or -1: sqrt(I) = 1 and H = {example['H']:g} > 1"
    )
    result(as_json, {**asdict(found), "violations": found.violations}, text)
    if found.violations:
        raise typer.Exit(FAILED)
