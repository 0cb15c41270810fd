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


def tasks(plugin: Plugins = None, as_json: Json = False) -> None:
    """List the tasks: name, metric, the score of the best constant answer, source."""
    plugins.add_files(plugin or ())
    offered = plugins.load_all(plugins.TASKS)
    found = [*catalogue.tasks(), *({**catalogue.task_row(name), **_from(plugins.TASKS, name)} for name in offered)]
    lines = [f"{t['name']:<24} {t['metric']:<28} {_chance(t)}  {t['source']}{_plugged(t)}" for t in found]
    result(as_json, found, "\n".join(lines))


def _chance(row: dict[str, Any]) -> str:
    return " " * 12 if row["chance"] is None else f"chance {row['chance']:.3f}"


def methods(
    name: Annotated[str | None, typer.Argument(help="A method to show in full.", show_default=False)] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List the methods with what selection reads, its cost and its source; or show one method in full."""
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
    lines = [
        f"{m['name']}: {m['summary']}\n"
        f"    reads {m['reads']}; passes over the weights: {m['passes']}; bytes: {m['bytes']}\n"
        f"    {_options(m)}\n"
        f"    {m['source']}{_plugged(m)}"
        for m in found
    ]
    for through, title in (("peft", "adapters, through peft"), ("selectune", "adapters, our own")):
        lines.append(
            f"\n{title}; as --method name:option=value, and under a selective method as --on name:option=value; "
            "16 bytes a scalar of the adapter"
        )
        lines += [_adapter(m) for m in everything if m.get("through") == through]
    result(as_json, everything, "\n".join(lines))


def _plugged_in(name: str | None) -> list[dict[str, Any]]:
    """The rows of the methods of plug-ins."""
    if name is not None and all(m["name"] != name for m in catalogue.methods()):
        plugins.want_method(name)
    return [{**catalogue.row(name), **_from(plugins.METHODS, name)} for name in plugins.load_all(plugins.METHODS)]


def _from(group: str, name: str) -> dict[str, Any]:
    plugin = plugins.source_of(group, name)
    return {} if plugin is None else {"plugin": plugin.as_json()}


def _plugged(row: dict[str, Any]) -> str:
    """The source of a plugged-in method or task, for people."""
    return f"; plug-in {' '.join(row['plugin'].values())}" if "plugin" in row else ""


def _options(m: dict[str, Any]) -> str:
    """The options of a method with their defaults, and the options of `train` that it takes."""
    own = ", ".join(f"{name}={value}" for name, value in m["options"].items())
    apart = ["--" + name.replace("_", "-") for name in ("budget", "train_fully") if name in m["takes"]]
    return f"options {', '.join(filter(None, (own, *apart))) or 'none'}"


def _in_full(m: dict[str, Any]) -> str:
    return f"{join(m['name'], m['options'])}\n\n{m['doc'] or m['summary']}\n\nsource: {m['source']}"


def _adapter(m: dict[str, Any]) -> str:
    options = f"options {', '.join(m['takes'])}" if m["takes"] else "no options"
    return (
        f"{m['name']}: {m['summary']}\n"
        f"    {options}; learning rate {m['lr']:g} ({m['lr_source']})" + ("" if m["on"] else "; not for --on") + "\n"
        f"    {m['source']}"
    )
