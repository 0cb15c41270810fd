"""`selectune demo`: the first thing that people see. A line at once, a table at the end, and what to try next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from selectune.cli import values
from selectune.cli.options import Data, Json
from selectune.cli.output import ProgressBar, result, stderr, working

if TYPE_CHECKING:
    from selectune.runs.comparison import DemoResult, Row

EXAMPLES = "Examples:  selectune demo\n\nselectune demo --data DIR --out runs/demo --json"
LEARNT = {
    "glue/stsb": ("how similar two sentences are", ""),
    "demo/topic": (
        "what a sentence is about, one of 12 topics",
        "It is measured on sentences whose nouns it never saw in training.",
    ),
}


def demo(
    data: Data = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Keep the deltas in this folder. Default: they are thrown away.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="A folder, a hub id, or 'demo'.")] = "demo",
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            "-t",
            help="Default: glue/stsb where --data or SELECTUNE_DATA has it, else demo/topic, which needs no data.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of each method. Default: 240, or 120 for demo/topic.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="Scalars that ID3 and the random mask may change. Default: 0.17%.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the head, the order of the data, dropout, the random mask.")] = 6,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Runs that are in --out may go; otherwise they are refused.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the point in minutes: one small model untuned, and tuned by a random mask, LoRA, ID3 and as a whole.

    Then ID3's file is verified, put on a fresh base and taken off again, bit for bit.
    """
    share = None if budget is None else values.budget(budget)
    say("A small model is measured, then tuned in several ways; this takes minutes. PyTorch is being loaded.")
    from selectune.runs import comparison as demos

    with working():
        scalars = demos.BUDGET if share is None else share
        found = demos.demo(data, out, model, task, steps, scalars, seed, ProgressBar(), say, overwrite)
    result(as_json, found.as_json(), page(found, data))


def say(sentence: str) -> None:
    """A line on stderr, so that nobody looks at a blank screen."""
    stderr().print(f"[dim]{escape(sentence)}[/]")


def page(found: DemoResult, data: str | None = None) -> str:
    """What the demo found, in 80 columns."""
    name = "MiniLM" if found.model == "demo" else found.model
    what, how = LEARNT.get(found.task, ("", ""))
    lines = [
        f"{name} ({found.weights:,} weights)" + (f" learns {what}." if what else f" on {found.task}."),
        *([how] if how else []),
        f"Task {found.task}, data {found.origin}, {found.steps} steps for each method.",
        f"The score is the {found.metric}; chance is {found.chance:.2f}.",
        "",
        f"{'':<16} {'score':>7} {'trained':>12} {'share':>8} {'s/step':>8} {'file':>10}",
        *(_line(row) for row in found.rows),
        "",
        *_proofs(found),
        f"All of it took {found.seconds:.0f} seconds."
        + (f" ID3's file is {found.delta}." if found.delta else " The files were thrown away."),
        f"Try next: {_program()} train -m {shlex.quote(found.model)} -t {found.task} -b 1% -o runs/first"
        + (f" --data {shlex.quote(data)}" if data else ""),
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if not row.trained:
        return f"{row.name:<16} {row.value:>7.3f} {0:>12} {'-':>8} {'-':>8} {'-':>10}"
    size = f"{row.delta_bytes / 1e6:,.2f} MB"
    return f"{row.name:<16} {row.value:>7.3f} {row.trained:>12,} {row.share:>8.2%} {row.step_seconds:>8.3f} {size:>10}"


def _proofs(found: DemoResult) -> list[str]:
    revert = found.revert
    return [
        f"Verified: ID3's file, put on a fresh base, scores {revert.value_applied:.4f} again;",
        f"  {revert.scalars_changed:,} weights differ from the base, compared by their bits.",
        f"Reverted: taken off again, all {revert.tensors} tensors have the bits they had before.",
    ]


def _program() -> str:
    """The program's name as it was typed, so that the next line can be: `make demo` runs .venv/bin/selectune."""
    return sys.argv[0] if Path(sys.argv[0]).name == "selectune" else "selectune"
