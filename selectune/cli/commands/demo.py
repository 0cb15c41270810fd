"""`selectune demo`: a line at once, a table at the end, and a command to try next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from selectune.cli import values
from selectune.cli.options import Data, Json, option
from selectune.cli.output import ProgressBar, result, stderr, working

if TYPE_CHECKING:
    from selectune.runs.comparison import DemoResult, Row

EXAMPLES = "Examples:  selectune demo\n\nselectune demo --data DIR --out runs/demo --json"
LEARNT = {
    "glue/stsb": ("how similar two sentences are", ""),
    "demo/topic": (
        "what a sentence is about, one of 12 topics",
        "It is measured on sentences with nouns that it never saw in training.",
    ),
}


def demo(
    data: Data = None,
    out: Annotated[str | None, option("Folder that keeps the deltas. Default: none.", "--out", "-o")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="A folder, a hub id, or 'demo'.")] = "demo",
    task: Annotated[
        str | None,
        option(
            "Default: glue/stsb if --data or SELECTUNE_DATA has it, else demo/topic.",
            "--task",
            "-t",
        ),
    ] = None,
    steps: Annotated[int | None, option("Optimizer steps of each method. Default: 240, or 120 for demo/topic.")] = None,
    budget: Annotated[
        str | None, option("Scalars that ID3 and the random mask may change. Default: 0.17%.", "--budget", "-b")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the head, the data order, dropout and the random mask.")] = 6,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace runs that are in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Compare a small model untuned, and tuned by a random mask, LoRA, ID3 and full fine-tuning, in minutes.

    Then ID3's file is applied to a fresh base, measured and reverted, and every bit is compared.
    """
    share = None if budget is None else values.budget(budget)
    say("Loading PyTorch. A small model is then measured and tuned in several ways, which takes minutes.")
    from selectune.runs import comparison as demos

    with working():
        scalars = demos.BUDGET if share is None else share
        found = demos.demo(data, out, model, task, steps, scalars, seed, ProgressBar(), say, overwrite)
    result(as_json, found.as_json(), page(found, data))


def say(sentence: str) -> None:
    """Prints a line on stderr, so that nobody looks at a blank screen."""
    stderr().print(f"[dim]{escape(sentence)}[/]")


def page(found: DemoResult, data: str | None = None) -> str:
    """The result of the demo, in 80 columns."""
    name = "MiniLM" if found.model == "demo" else found.model
    what, how = LEARNT.get(found.task, ("", ""))
    lines = [
        f"{name} ({found.weights:,} weights)" + (f" learns {what}." if what else f" on {found.task}."),
        *([how] if how else []),
        f"Task {found.task}, data {found.origin}, {found.steps} steps for each method.",
        f"The score is the {found.metric}" + ("." if found.chance is None else f"; chance is {found.chance:.2f}."),
        "",
        f"{'':<16} {'score':>7} {'trained':>12} {'share':>8} {'s/step':>8} {'file':>10}",
        *(_line(row) for row in found.rows),
        "",
        *_proofs(found),
        f"All of it took {found.seconds:.0f} seconds."
        + (f" ID3's file is {found.delta}." if found.delta else " The files were removed."),
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
    """The program's name as it was typed: `make demo` runs .venv/bin/selectune."""
    return sys.argv[0] if Path(sys.argv[0]).name == "selectune" else "selectune"
