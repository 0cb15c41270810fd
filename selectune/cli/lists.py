"""`selectune tasks`, `selectune methods` and `selectune demo`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectune.cli import catalogue, values
from selectune.cli.options import Data, Json
from selectune.cli.output import Bar, result, working
from selectune.cli.runs import train
from selectune.tasks import TASKS

if TYPE_CHECKING:
    from selectune.harness.demo import DemoResult

DEMO_EXAMPLES = "Examples:  selectune demo\n\nselectune demo --data DIR --out runs/demo --json"


def tasks(as_json: Json = False) -> None:
    """List the tasks: name, metric, what the best constant answer scores, source."""
    found = [
        {
            "name": task.name,
            "kind": task.kind,
            "metric": task.metric_name,
            "chance": task.chance,
            "epochs": task.epochs,
            "max_length": task.max_length,
            "source": task.source,
        }
        for task in TASKS.values()
    ]
    lines = [f"{t['name']:<21} {t['metric']:<28} chance {t['chance']:.3f}  {t['source']}" for t in found]
    result(as_json, found, "\n".join(lines))


def methods(as_json: Json = False) -> None:
    """List the methods: what each does, what selection reads, what it costs, source; then the dense peers."""
    everything = catalogue.methods()
    found = [m for m in everything if "through" not in m]
    peers = [m for m in everything if "through" in m]
    lines = [
        f"{m['name']}: {m['summary']}\n"
        f"    reads {m['reads']}; passes over the weights: {m['passes']}; bytes: {m['bytes']}\n"
        f"    {_options(m['takes'])}\n"
        f"    {m['source']}"
        for m in found
    ]
    for through, title in (("peft", "dense peers, through peft"), ("selectune", "dense peers, our own adapters")):
        lines.append(
            f"\n{title}; as --method name:option=value, and under a selective method as --on name:option=value; "
            "16 bytes a scalar of the module"
        )
        lines += [_peer(m) for m in peers if m["through"] == through]
    result(as_json, everything, "\n".join(lines))


def _options(takes: list[str]) -> str:
    """The options of `selectune train` that a recipe's parameters are."""
    known = inspect.signature(train).parameters
    names = [name for name in takes if name in known]
    if "scope" in takes:
        names[len(names) - ("train_fully" in names) :] = ["include"]
        names += ["exclude", "train_fully"] if "train_fully" in takes else []
    return "options " + ", ".join("--" + name.replace("_", "-") for name in names)


def _peer(m: dict[str, Any]) -> str:
    options = f"options {', '.join(m['takes'])}" if m["takes"] else "no options"
    return (
        f"{m['name']}: {m['summary']}\n"
        f"    {options}; learning rate {m['lr']:g} ({m['lr_source']})" + ("" if m["on"] else "; not for --on") + "\n"
        f"    {m['source']}"
    )


def demo(
    data: Data = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Keep the deltas in this folder. Default: they are thrown away.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="A folder, a hub id, or 'demo'.")] = "demo",
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", help="Default: STS-B where it can be had, else generated sentences."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of each method. Default: 240, or 320 for generated sentences.")
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
    as_json: Json = False,
) -> None:
    """Show the point in minutes: base, ID3, a random mask and full fine-tuning of one small model, and the revert."""
    share = None if budget is None else values.budget(budget)
    from selectune.harness import demo as demos

    with working():
        scalars = demos.BUDGET if share is None else share
        found = demos.demo(data, out, model, task, steps, scalars, seed, Bar())
    result(as_json, found.as_json(), _table(found))


def _table(found: DemoResult) -> str:
    lines = [
        f"{found.model} on {found.task}, {found.steps} steps each; {found.metric} (chance {found.chance:.3f})",
        f"data: {found.origin}",
        "",
        f"{'':<8} {'metric':>8} {'trained':>12} {'delta bytes':>12} {'seconds':>8}",
    ]
    lines += [
        f"{row.name:<8} {row.value:>8.4f} {row.trained:>12,} {row.delta_bytes:>12,} {row.seconds:>8.0f}"
        for row in found.rows
    ]
    revert = found.revert
    lines += [
        "",
        f"ID3's delta read from its file and put on a fresh base: {revert.value_applied:.4f}, "
        f"{revert.scalars_changed:,} scalars differ.",
        f"Taken off again: all {revert.tensors} tensors have the bits they had before.",
        f"{found.seconds:.0f} s in all." + (f" The delta is {found.delta}." if found.delta else ""),
    ]
    return "\n".join(lines)
