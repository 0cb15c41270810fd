"""Plug-ins: methods and tasks of other packages, by entry points, and of files, by `--plugin FILE`.

A package offers a method by an entry point of the group `selectune.methods` (a recipe function or a `Recipe`) and a
task by one of the group `selectune.tasks` (a `Task`). The entry point has the name of the method or task. A package is
imported only when somebody asks for that name or for the whole list, so it cannot break a run that does not use it.
A file offers the members of its lists RECIPES and TASKS. What is found goes into the tables of recipes and tasks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from selectune.errors import ConfigError, PluginError, SelectuneError

if TYPE_CHECKING:
    from selectune.tasks import Task

log = logging.getLogger("selectune")

METHODS, TASKS = "selectune.methods", "selectune.tasks"
"""The groups of entry points."""

_WORD = {METHODS: "method", TASKS: "task"}
_UNKNOWN = "not known"


@dataclass(frozen=True)
class Plugin:
    """A distribution with its version, or a file with its sha256."""

    name: str
    version: str = ""
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}" if self.version else self.name

    def as_json(self) -> dict[str, str]:
        """The record of it in run.json and in checkpoints."""
        return {key: value for key, value in vars(self).items() if value}


_sources: dict[tuple[str, str], Plugin] = {}  # {(group, name): where it came from}
_files: dict[Path, Plugin] = {}  # as they were read last


def source_of(group: str, name: str) -> Plugin | None:
    """The plug-in that a method or a task came from; None for our own."""
    return _sources.get((group, name))


def used(method: str, task: str | None) -> list[dict[str, str]]:
    """The plug-ins that a run's method and task came from, for its record."""
    found = dict.fromkeys(filter(None, (source_of(METHODS, method), source_of(TASKS, task or ""))))
    return [plugin.as_json() for plugin in found]


def want_method(name: str) -> None:
    """Loads the package that offers this method, if the method is not in the table yet. Raises PluginError."""
    _want(METHODS, name)


def task(name: str) -> Task:
    """The task of this name, ours or a package's. Raises UnknownTaskError, or PluginError for a broken package."""
    from selectune.tasks import get

    _want(TASKS, name)
    return get(name)


def load_all(group: str) -> list[str]:
    """Loads every package that offers something in this group, and returns the names of what all plug-ins offer.

    A broken package is a warning in the log, so that the others can still be listed.
    """
    for entry in metadata.entry_points(group=group):
        if (source := source_of(group, entry.name)) is None or source != _distribution(entry):
            try:
                _load(group, entry)
            except PluginError as error:
                log.warning("%s", error)
    return [name for at, name in _sources if at == group]


def add_files(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Puts the recipes and tasks of Python files into the tables. A file that was added before is read again.

    Raises ConfigError for a file that does not exist, and PluginError for one that raises, offers nothing, or offers
    a name that is taken.
    """
    for path in map(Path, paths):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"The plug-in {path} cannot be read: {error.strerror or error}.") from error
        plugin = Plugin(path.name, sha256=hashlib.sha256(data).hexdigest())
        if plugin not in _sources.values():
            _forget(_files.get(path.resolve()))
            _files[path.resolve()] = plugin
            try:
                _add_members(plugin, _run(plugin, path, data))
            except PluginError:
                _forget(plugin)
                raise


@contextlib.contextmanager
def blame(plugin: Plugin | None) -> Iterator[None]:
    """Within it, an exception of a plug-in's code becomes a PluginError with the plug-in's name and the reason."""
    try:
        yield
    except SelectuneError:
        raise
    except (Exception, SystemExit) as error:
        if plugin is None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise PluginError(f"The plug-in {plugin} failed: {type(error).__name__}{reason and f': {reason}'}") from error


class _Bytes(SourceFileLoader):
    """Runs the bytes whose sha256 is recorded, never a cached compilation."""

    def __init__(self, name: str, path: str, data: bytes) -> None:
        super().__init__(name, path)
        self._data = data

    def get_data(self, path: str) -> bytes:
        return self._data

    def path_stats(self, path: str) -> Any:
        raise OSError  # so importlib neither reads nor writes a .pyc file


def _run(plugin: Plugin, path: Path, data: bytes) -> Any:
    name = f"selectune_plugin_{plugin.sha256[:16]}"
    spec = spec_from_file_location(name, path, loader=_Bytes(name, str(path), data))
    if spec is None or spec.loader is None:
        raise PluginError(f"The plug-in {plugin} is no Python file.")
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look their module up
    with blame(plugin):
        spec.loader.exec_module(module)
    return module


def _add_members(plugin: Plugin, module: Any) -> None:
    offered = {METHODS: getattr(module, "RECIPES", []), TASKS: getattr(module, "TASKS", [])}
    for group, things in offered.items():
        if not isinstance(things, list | tuple):
            raise PluginError(f"The plug-in {plugin}: its {_WORD[group]}s are {things!r:.80}, not a list.")
        for thing in things:
            _add(group, thing, plugin, None)
    if not any(offered.values()):
        raise PluginError(f"The plug-in {plugin} offers nothing: it has no list RECIPES and no list TASKS.")


def _forget(plugin: Plugin | None) -> None:
    for group, name in [key for key, source in _sources.items() if source == plugin]:
        del _table(group)[name], _sources[group, name]


def _want(group: str, name: str) -> None:
    if name in _taken(group):
        return
    found = [entry for entry in metadata.entry_points(group=group) if entry.name == name]
    if len(found) > 1:
        packages = ", ".join(str(_distribution(entry)) for entry in found)
        raise PluginError(f"Several packages offer the {_WORD[group]} '{name}': {packages}. Keep one of them.")
    if found:
        _load(group, found[0])


def _distribution(entry: metadata.EntryPoint) -> Plugin:
    return Plugin(entry.value, "?") if entry.dist is None else Plugin(entry.dist.name, entry.dist.version)


def _load(group: str, entry: metadata.EntryPoint) -> None:
    plugin = _distribution(entry)
    _refuse_taken(group, entry.name, plugin)
    with blame(plugin):
        thing = entry.load()
    _add(group, thing, plugin, entry.name)


def _add(group: str, thing: Any, plugin: Plugin, name: str | None) -> None:
    """Checks what a plug-in offers, and puts it into its table. `name`: of the entry point."""
    if group == METHODS:
        thing = _recipe(thing, plugin, name)
    elif not _is_task(thing):
        raise PluginError(f"The plug-in {plugin} offers {thing!r:.80} as a task; a selectune.tasks.Task is needed.")
    if name is not None and name != thing.name:
        raise PluginError(f"The plug-in {plugin}: the entry point '{name}' leads to '{thing.name}', another name.")
    if not isinstance(thing.name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", thing.name):
        raise PluginError(f"The plug-in {plugin}: {thing.name!r:.80} cannot be a name; letters, digits, . _ - / can.")
    _refuse_taken(group, thing.name, plugin)
    _table(group)[thing.name] = thing
    _sources[group, thing.name] = plugin


def _is_task(thing: Any) -> bool:
    from selectune.tasks import Task

    return isinstance(thing, Task)


def _taken(group: str) -> set[str]:
    if group == TASKS:
        return set(_table(TASKS))
    from selectune.adapters import KINDS

    return {*_table(group), *KINDS}


def _refuse_taken(group: str, name: str, plugin: Plugin) -> None:
    if name in _taken(group):
        whose = source_of(group, name) or "selectune"
        raise PluginError(f"The plug-in {plugin} offers the {_WORD[group]} '{name}', a name that {whose} has already.")


def _recipe(thing: Any, plugin: Plugin, name: str | None) -> Any:
    from selectune.method import Method
    from selectune.recipes import RECIPES, Recipe

    if not isinstance(thing, Recipe):
        if not inspect.isroutine(thing):
            raise PluginError(f"The plug-in {plugin} offers {thing!r:.80} as a method; a recipe function is needed.")
        called = name or thing.__name__.replace("_", "-")
        thing = Recipe(called, cast(Any, thing), _UNKNOWN, f"the plug-in {plugin}", _UNKNOWN, _UNKNOWN)
    optimizers = {recipe.optimizer for recipe in RECIPES.values()}
    if thing.optimizer not in optimizers:
        known = ", ".join(sorted(optimizers))
        raise PluginError(f"The plug-in {plugin}: {thing.name} has no optimizer {thing.optimizer!r}. Known: {known}.")
    own, function = ("budget", "steps"), thing.function
    for option in inspect.signature(function).parameters.values():
        by_name = option.kind in (option.POSITIONAL_OR_KEYWORD, option.KEYWORD_ONLY)
        if not by_name or (option.default is option.empty and option.name not in own):
            raise PluginError(f"The plug-in {plugin}: the option {option.name} of {thing.name} needs a default value.")

    @functools.wraps(function)
    def guarded(**given: Any) -> Method:
        with blame(plugin):
            made = function(**given)
            if not isinstance(made, Method):
                raise TypeError(f"{thing.name} returned {made!r:.80}, not a selectune.Method")
            return made

    return Recipe(**{**vars(thing), "function": guarded})


def _table(group: str) -> dict[str, Any]:
    if group == TASKS:
        from selectune.tasks import TASKS as table

        return table
    from selectune.recipes import RECIPES

    return RECIPES
