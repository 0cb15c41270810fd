"""The types of a grid's values, checked before any is used: what is wrong, where, what it is, and what it may be."""

from __future__ import annotations

import functools
import math
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from selectune.errors import StudyError, did_you_mean
from selectune.runs.config import RunConfig
from selectune.study.cells import FILES

PLACES = (*FILES, "data", "plugin")
"""Options that name a file or a folder, or a task's text or a data set of the hub."""

_CALLED = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
_ENTRIES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "models": ((str,), "the name of a model"),
    "tasks": ((str, Mapping), "the name of a task, or a mapping of options such as {train: my.csv, ...}"),
    "methods": ((str, Mapping), "a method, or a mapping of options such as {method: id3, lr: 1e-3}"),
    "budgets": ((str, int, float, type(None)), "a number or a text such as 0.17%"),
    "on": ((str, type(None)), "an adapter such as lora:r=8, or null for none"),
    "runs": ((Mapping,), "a mapping of options such as {lr: 1e-3, seed: 6}"),
    "measure": ((str,), "the name of a task"),
}


def checked(told: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A study's values by name, of the types that a `Grid` takes: lists are lists, also those of one text.

    Names are the caller's to check, as values of the right type are a run's. Raises StudyError, which names `where`.
    """
    found = dict(told)
    if not isinstance(found.get("question", ""), str):
        raise _wrong(where, "question", "a text", found["question"])
    for name, (types, what) in _ENTRIES.items():
        for at, entry in enumerate(found.get(name, ()), 1):
            if not isinstance(entry, types) or isinstance(entry, bool) or (type(entry) is str and not entry.strip()):
                raise _wrong(where, f"entry {at} of {name}", what, entry)
    for name in ("tasks", "methods", "runs"):
        if name in found:
            found[name] = tuple(
                _options(entry, where, f"entry {at} of {name}") if isinstance(entry, Mapping) else entry
                for at, entry in enumerate(found[name], 1)
            )
    for at, entry in enumerate(found.get("runs", ()), 1):
        _known(entry, where, f"entry {at} of runs")
    if isinstance(found.get("settings"), Mapping):
        found["settings"] = _options(found["settings"], where, "settings")
    search = found.get("search")
    if isinstance(search, Mapping) and "hold_out" in search:
        share = search["hold_out"]
        if not _is(share, (float,)) or not 0 < share < 1:
            raise _wrong(where, "hold_out of search", "a share of the training rows, above 0 and below 1", share)
    return found


def _options(told: Mapping[str, Any], where: str, place: str) -> dict[str, Any]:
    """Options of a run, and those that a method's mapping has beside."""
    found = dict(told)
    for name, value in told.items():
        at = f"{name} in {place}"
        if name == "rates" and value is not None:
            good = isinstance(value, list | tuple) and all(_is(v, (float,)) and 0 < v < math.inf for v in value)
            if not good:
                raise _wrong(where, at, "a list of numbers above 0", value)
        elif name == "runs":
            if not isinstance(value, list | tuple) or not all(isinstance(run, Mapping) for run in value):
                raise _wrong(where, at, "a list of mappings such as {lr: 1e-3, seed: 6}", value)
            found[name] = [_options(run, where, at) for run in value]
            for run in found[name]:
                _known(run, where, at)
        elif name in _forms() and value is not None:
            found[name] = _option(value, *_forms()[name], where, at)
            if name in PLACES:
                found[name] = _anchored(name, found[name])
    return found


def _anchored(of: str, value: Any) -> Any:
    """Places of files and folders from the root on, so that a study is the same wherever its commands are given."""
    if isinstance(value, list):
        return [_anchored(of, entry) for entry in value]
    path = os.path.expanduser(value)
    return os.path.abspath(path) if (os.path.isdir if of == "data" else os.path.isfile)(path) else value


def _option(value: Any, many: bool, types: Sequence[type], where: str, at: str) -> Any:
    if not many:
        if not _is(value, types):
            raise _wrong(
                where, at, " or ".join(_CALLED[of] for of in types if of is not int or float not in types), value
            )
        return value
    entries = list(value) if isinstance(value, list | tuple) else [value]
    if not all(_is(entry, types) for entry in entries):
        raise _wrong(where, at, f"{_CALLED[types[0]]} or a list, each entry {_CALLED[types[0]]}", value)
    return entries


def _known(run: Mapping[str, Any], where: str, place: str) -> None:
    for name in run:
        if name not in _forms():
            raise StudyError(
                f"{where}: {name} in {place} is no option of a run.{did_you_mean(str(name), list(_forms()))}"
            )


def _is(value: Any, types: Sequence[type]) -> bool:
    """Whether a value has one of these types. An integer is a number, and true is neither."""
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, (*types, int) if float in types else tuple(types))


@functools.cache
def _forms() -> dict[str, tuple[bool, tuple[type, ...]]]:
    """For each option of a run: whether it is a list, and the types of its value or of an entry."""
    found = {}
    for name, hint in typing.get_type_hints(RunConfig).items():
        if typing.get_origin(hint) is tuple:
            found[name] = (True, (typing.get_args(hint)[0],))
        else:
            found[name] = (False, tuple(of for of in typing.get_args(hint) or (hint,) if of is not type(None)))
    return found


def _wrong(where: str, place: str, what: str, value: Any) -> StudyError:
    return StudyError(f"{where}: {place} must be {what}, got {value!r}.")
