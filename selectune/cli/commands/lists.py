"""`selectune tasks` and `selectune methods`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from selectune.cli import catalogue
from selectune.cli.options import Json
from selectune.cli.output import result
from selectune.errors import ConfigError, did_you_mean
from selectune.spec import join
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


def methods(
    name: Annotated[str | None, typer.Argument(help="One of them, in full.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the methods: what each does, what selection reads, what it costs, source; or one of them in full."""
    everything = catalogue.methods()
    if name is not None:
        one = next((m for m in everything if m["name"] == name), None)
        if one is None:
            known = [m["name"] for m in everything]
            raise ConfigError(f"Unknown method '{name}'. Known: {', '.join(known)}.{did_you_mean(name, known)}")
        result(as_json, one, _in_full(one))
        return
    found = [m for m in everything if "through" not in m]
    peers = [m for m in everything if "through" in m]
    lines = [
        f"{m['name']}: {m['summary']}\n"
        f"    reads {m['reads']}; passes over the weights: {m['passes']}; bytes: {m['bytes']}\n"
        f"    {_options(m)}\n"
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


def _options(m: dict[str, Any]) -> str:
    """What a method takes: options of its own with their defaults, written after its name, and some of `train`'s."""
    own = ", ".join(f"{name}={value}" for name, value in m["options"].items())
    apart = ["--" + name.replace("_", "-") for name in ("budget", "train_fully") if name in m["takes"]]
    return f"options {', '.join(filter(None, (own, *apart))) or 'none'}"


def _in_full(m: dict[str, Any]) -> str:
    return f"{join(m['name'], m['options'])}\n\n{m['doc'] or m['summary']}\n\nsource: {m['source']}"


def _peer(m: dict[str, Any]) -> str:
    options = f"options {', '.join(m['takes'])}" if m["takes"] else "no options"
    return (
        f"{m['name']}: {m['summary']}\n"
        f"    {options}; learning rate {m['lr']:g} ({m['lr_source']})" + ("" if m["on"] else "; not for --on") + "\n"
        f"    {m['source']}"
    )
