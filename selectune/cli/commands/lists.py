"""`selectune tasks` and `selectune methods`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from selectune import plugins
from selectune.cli import catalogue
from selectune.cli.options import Json, Plugins
from selectune.cli.output import result
from selectune.errors import ConfigError, did_you_mean
from selectune.spec import join
from selectune.tasks import TASKS


def tasks(plugin: Plugins = None, as_json: Json = False) -> None:
    """List the tasks: name, metric, the score of the best constant answer, source."""
    plugins.add_files(plugin or ())
    plugins.load_all(plugins.TASKS)
    found = [
        {
            "name": task.name,
            "kind": task.kind,
            "metric": task.metric_name,
            "chance": task.chance,
            "epochs": task.epochs,
            "max_length": task.max_length,
            "source": task.source,
            **_from(plugins.TASKS, task.name),
        }
        for task in TASKS.values()
    ]
    lines = [f"{t['name']:<21} {t['metric']:<28} chance {t['chance']:.3f}  {t['source']}{_plugged(t)}" for t in found]
    result(as_json, found, "\n".join(lines))


def methods(
    name: Annotated[str | None, typer.Argument(help="One of them, in full.", show_default=False)] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List the methods: what each does, what selection reads, what it costs, source; or one of them in full."""
    plugins.add_files(plugin or ())
    everything = [*catalogue.methods(), *_plugged_in(name)]
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
        f"    {m['source']}{_plugged(m)}"
        for m in found
    ]
    for through, title in (("peft", "dense peers, through peft"), ("selectune", "dense peers, our own adapters")):
        lines.append(
            f"\n{title}; as --method name:option=value, and under a selective method as --on name:option=value; "
            "16 bytes a scalar of the module"
        )
        lines += [_peer(m) for m in peers if m["through"] == through]
    result(as_json, everything, "\n".join(lines))


def _plugged_in(name: str | None) -> list[dict[str, Any]]:
    """The rows of methods from plug-ins: all of them, or the one that is asked for."""
    if name is not None and all(m["name"] != name for m in catalogue.methods()):
        plugins.want_method(name)
    return [{**catalogue.row(name), **_from(plugins.METHODS, name)} for name in plugins.load_all(plugins.METHODS)]


def _from(group: str, name: str) -> dict[str, Any]:
    plugin = plugins.source_of(group, name)
    return {} if plugin is None else {"plugin": plugin.as_json()}


def _plugged(row: dict[str, Any]) -> str:
    """Where a plugged-in method or task comes from, for people."""
    return f"; plug-in {' '.join(row['plugin'].values())}" if "plugin" in row else ""


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
