"""`selectune tasks` and `selectune methods`."""

from __future__ import annotations

import inspect
from typing import Any

from selectune.cli import catalogue
from selectune.cli.options import Json
from selectune.cli.output import result
from selectune.cli.runs import train
from selectune.tasks import TASKS


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
