"""The grid of a study: what a file asks for, as cells.

    name: core
    question: Which method is best with 0.17 % of the weights?
    models: [demo]
    tasks: [glue/stsb, {train: my.csv, validation: dev.csv, text: [question], label: topic}]
    methods: [full, "lora:r=8", id3, "id3+lora:r=32", {method: full, include: ["classifier.*"], name: head only}]
    budgets: [0.17%]
    seeds: [1, 2, 3]
    search: {factors: [0.3, 1, 3], seeds: [100], hold_out: 0.1}
    settings: {max_steps: 300, batch_size: 16, train_fully: ["classifier.*"]}

`settings` are options of `selectune train`. A method that takes no budget, or no `train_fully`, is a row without it.
The method `base` trains nothing: its row is the untuned model's, with `pattern`, `words` and `shots` that of examples
in context. `runs` in place of rates and seeds pairs them, for all methods or for one: [{lr: 1e-4, seed: 6}, {lr: 3e-4,
seed: 7}]. `measure` names more tasks that every run's delta is measured on. `twin` has other values for a small form of
the study.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectune import plugins, spec
from selectune.adapters import KINDS
from selectune.documents import read_document
from selectune.errors import SelectuneError, StudyError, did_you_mean
from selectune.models.adapted import parts, peer
from selectune.recipes import RECIPES
from selectune.runs.config import RunConfig
from selectune.study.asked.shape import checked
from selectune.study.cells import BASE, Cell, of_base
from selectune.study.records import Setting

LISTS = ("models", "tasks", "methods", "budgets", "on", "seeds", "runs", "measure")
_GRANTED = tuple(f.name for f in dataclasses.fields(RunConfig) if f.name not in ("out", "checkpoint_budgets"))
_SELECTING = ("include", "exclude", "train_fully")
_AXES = {"model": "models", "task": "tasks", "train": "tasks", "method": "methods", "budget": "budgets"}
_AXES |= {"on": "on", "seed": "seeds"}
_LIMIT = 1 << 20


@dataclass(frozen=True)
class Search:
    """The search for a learning rate: so many trials for every method, on held-out training rows.

    `factors`: of a method's own default rate. `seeds`: of the trials, which no run of the main part has. `hold_out`:
    the share of the training rows that the trials are measured on, and not trained on.
    """

    factors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    seeds: tuple[int, ...] = (100,)
    hold_out: float = 0.1


@dataclass(frozen=True)
class Arm:
    """The cells that differ in rate and seed only: one row of a table, on one task."""

    settings: Mapping[str, Any]
    rates: tuple[float, ...] | None = None  # of the search, if the grid names them for this method; () for no search
    runs: tuple[Mapping[str, Any], ...] = ()  # rates and seeds in pairs
    measure: tuple[str, ...] = ()
    name: str | None = None  # of the method in tables
    title: str | None = None  # of the task in tables

    @functools.cached_property
    def setting(self) -> Setting:
        return setting_of(self.cell("main", self.settings))

    def cell(self, phase: str, settings: Mapping[str, Any]) -> Cell:
        """A cell of this arm."""
        return Cell(phase, settings, self.measure if phase == "main" else (), self.name, self.title)

    def trials(self, search: Search) -> list[Cell]:
        apart = ("validation", "retain")  # trials are measured on training rows
        settings = {name: value for name, value in self.settings.items() if name not in apart}
        base = self.cell("search", settings)
        if self.rates is not None:
            rates: Sequence[float] = self.rates
        else:
            own = self.cell("main", self.settings).config.learning_rate
            rates = [float(f"{own * factor:.6g}") for factor in search.factors]
        return [base.with_(lr=lr, seed=seed, hold_out=search.hold_out) for lr in rates for seed in search.seeds]


@dataclass(frozen=True)
class Grid:
    """A study as it is asked for. Raises StudyError, or ConfigError for a cell's settings, when it is made."""

    name: str
    question: str = ""
    models: tuple[str, ...] = ("demo",)
    tasks: tuple[Any, ...] = ()
    methods: tuple[Any, ...] = ()
    budgets: tuple[Any, ...] = ()
    on: tuple[str | None, ...] = (None,)
    seeds: tuple[int, ...] = (1,)
    runs: tuple[Mapping[str, Any], ...] = ()
    measure: tuple[str, ...] = ()
    search: Search | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("models", "tasks", "methods"):
            if not getattr(self, name):
                raise StudyError(f"The study {self.name} names no {name}, so it has no cells.")
        for name, axis in _AXES.items():
            if name in self.settings:
                raise StudyError(
                    f"The study {self.name}: settings has {name}, which is an axis; write it under {axis}."
                )
        if self.search is not None:
            self._check_search(self.search)
        rows: set[Setting] = set()
        for arm in self.arms:
            if arm.setting in rows:
                raise StudyError(
                    f"The study {self.name} has a cell twice, or two rows of a table under one name: "
                    f"{arm.setting.method} on {arm.setting.task}. Give one of the methods or tasks a name, as in "
                    "{method: full, name: head only, ...} or {train: a/rows.csv, name: a, ...}."
                )
            rows.add(arm.setting)
        self._check_measure({setting.task for setting in rows})
        seen: dict[str, str] = {}
        for arm in self.arms:
            runs = self.cells(arm, None)
            if not runs:
                raise StudyError(f"The study {self.name} names no seeds, so {arm.setting.method} has no runs.")
            cells = runs + self.trials(arm)
            for cell in cells:
                told = _told(cell)
                if (other := seen.setdefault(cell.key, told)) is not told:
                    raise StudyError(f"The study {self.name} has a cell twice: {told} is the same run as {other}.")
            if len({cell.config.seed for cell in runs}) < len(runs):
                raise StudyError(
                    f"The study {self.name}: two runs of {arm.setting.method} have one seed, and a table would show "
                    "one of them only. Give each run a seed of its own."
                )

    def _check_measure(self, tasks: set[str]) -> None:
        """Refuses unknown tasks, and those whose results could not be told from others under the same name."""
        for name in self.measure:
            plugins.task(name)
        if self.measure and (len(tasks) > 1 or tasks & set(self.measure)):
            raise StudyError(
                f"The study {self.name} measures on {', '.join(self.measure)} what is trained on "
                f"{'; '.join(sorted(tasks))}. A table names the measured task only, so give a study with measure one "
                "task, which it does not measure again."
            )

    def _check_search(self, search: Search) -> None:
        if any(arm.runs for arm in self.arms):
            raise StudyError("Give search, which finds a rate, or runs, which name one for each seed, not both.")
        if shared := set(search.seeds) & set(self.seeds):
            raise StudyError(
                f"The seeds {', '.join(map(str, sorted(shared)))} are both of the search and of the runs that count; "
                "the runs need seeds of their own."
            )
        if any("hold_out" in arm.settings for arm in self.arms):
            raise StudyError(
                "The runs that count are measured on a held-out share of the training rows, and a search would choose "
                "the rate on the same rows. Give validation rows in place of hold_out, or leave out the search "
                "(compare: --no-search)."
            )
        counts = {len(search.factors if arm.rates is None else arm.rates) for arm in self.arms} - {0}
        if len(counts) > 1:
            raise StudyError(
                f"A search is fair with as many trial rates for every method; here are {sorted(counts)} of them."
            )

    @functools.cached_property
    def arms(self) -> list[Arm]:
        """Every combination once; a method that takes no budget or no adapter has one without."""
        return list(self._combinations())

    def _combinations(self) -> Iterator[Arm]:
        for task in self.tasks:
            for model in self.models:
                for method in self.methods:
                    yield from self._of_method(model, task, method)

    def _of_method(self, model: str, task: Any, method: Any) -> Iterator[Arm]:
        own = dict(method) if isinstance(method, Mapping) else {"method": method}
        name = str(own.pop("method", "")).strip()
        if not name:
            raise StudyError(f"The study {self.name}: {method!r} names no method; write {{method: id3, ...}}.")
        name, under = parts(name)
        rates, runs = self._rates(name, own), own.pop("runs", self.runs)
        where = dict(task) if isinstance(task, Mapping) else {"task": task}
        called, title = (self._title(of) for of in (own, where))
        if called is not None and "," in called:
            raise StudyError(f"The study {self.name}: {called!r} has a comma, which separates methods in --methods.")
        takes = taken(name)
        shared = {key: value for key, value in self.settings.items() if key not in _SELECTING or key in takes}
        if under:
            own["on"] = under
        if name == BASE:
            shared, where, *runs = of_base(own | ({"rates": rates} if rates else {}), shared, where, *runs)
            rates = ()
        for on in self.on if "on" in takes and "on" not in own else [None]:
            for budget in self.budgets if self.budgets and "budget" in takes and "budget" not in own else [None]:
                axes = {"model": model, "method": name, "on": on, "budget": budget}
                given = {**axes, **shared, **where, **own}
                given = {key: value for key, value in given.items() if value is not None}
                self._check_names(given)
                yield Arm(given, rates, tuple(runs), self.measure, called, title)

    def _rates(self, method: str, own: dict[str, Any]) -> tuple[float, ...] | None:
        """The rates that a method's mapping names for the search: () for `search: false`, None if it names none."""
        searched, rates = own.pop("search", True), own.pop("rates", None)
        if not isinstance(searched, bool):
            raise StudyError(f"The study {self.name}: search of {method} must be true or false, got {searched!r}.")
        if rates is not None and not (self.search and searched):
            raise StudyError(
                f"The study {self.name}: {method} has rates, which are those of a search, and there is none. Give it "
                "lr, or runs, or the study a search."
            )
        return None if searched and rates is None else tuple(float(rate) for rate in rates or ())

    def _title(self, of: dict[str, Any]) -> str | None:
        """What a mapping calls its method or task in tables."""
        told = of.pop("name", None)
        if told is not None and (not isinstance(told, str) or not told.strip()):
            raise StudyError(f"The study {self.name}: a name in tables must be a text, got {told!r}.")
        return told

    def _check_names(self, given: Mapping[str, Any]) -> None:
        for key in given:
            if key not in _GRANTED:
                raise StudyError(
                    f"The study {self.name}: {key} is no option of a run.{did_you_mean(str(key), _GRANTED)}"
                )

    def trials(self, arm: Arm) -> list[Cell]:
        """The trials of an arm's rates; none without a search."""
        return arm.trials(self.search) if self.search else []

    def cells(self, arm: Arm, lr: float | None) -> list[Cell]:
        """The runs of an arm that count. `lr`: the rate that the search found; None for the grid's own."""
        base = arm.cell("main", arm.settings)
        if arm.runs:
            return [base.with_(**run) for run in arm.runs]
        return [base.with_(seed=seed, **({} if lr is None else {"lr": lr})) for seed in self.seeds]

    def as_json(self) -> dict[str, Any]:
        told = dataclasses.asdict(self)
        return {key: value for key, value in told.items() if value not in (None, (), {}, "")}


def taken(method: str) -> set[str]:
    """Which of a study's axes a method takes: budget, on, include, exclude, train_fully."""
    if method == BASE or peer(method) is not None:
        return set()
    recipe = RECIPES.get(method.partition(":")[0])
    if recipe is None:  # RunConfig names the known ones
        return {"budget"}
    parameters = inspect.signature(recipe.function).parameters
    found = {name for name in ("budget", "train_fully") if name in parameters}
    return (
        found | ({"include", "exclude"} if "scope" in parameters else set()) | ({"on"} if "budget" in found else set())
    )


def setting_of(cell: Cell) -> Setting:
    """The row of a table that a cell's runs stand in."""
    config = cell.config
    task = cell.title or config.task or os.path.basename(str(config.train))
    task += "" if config.train_size is None else f", {config.train_size:,} rows"
    if cell.untuned:
        return Setting(config.model, task, cell.name or BASE)
    method = config.method if peer(config.method) is not None else config.canonical
    budget = None if peer(config.method) is not None or "budget" not in taken(config.method) else config.budget
    return Setting(config.model, task, cell.name or method, config.on, budget)


def _told(cell: Cell) -> str:
    return f"{cell.phase} " + json.dumps(dict(cell.settings))


def of_mapping(told: Any, where: str) -> Grid:
    """The grid in a document's value. Raises StudyError, which names `where`."""
    if not isinstance(told, Mapping):
        raise StudyError(f"{where}: expected a study: name, models, tasks, methods, budgets, seeds, settings.")
    known = [f.name for f in dataclasses.fields(Grid)]
    for key in told:
        if key not in known:
            raise StudyError(
                f"{where}: a study has no {key}. It has {', '.join(known)}.{did_you_mean(str(key), known)}"
            )
    given = dict(told)
    for key in LISTS:
        if key in given:
            given[key] = tuple(given[key]) if isinstance(given[key], list) else (given[key],)
    given = checked(given, where)
    given["budgets"] = tuple(_budget(text, where) for text in given.get("budgets", ()))
    given["methods"] = tuple(
        {**m, "budget": _budget(m["budget"], where)} if isinstance(m, Mapping) and "budget" in m else m
        for m in given.get("methods", ())
    )
    if not all(type(seed) is int for seed in given.get("seeds", ())):
        raise StudyError(f"{where}: seeds must be integers, got {list(given['seeds'])!r}.")
    if given.get("search") is not None:
        given["search"] = _search(given["search"], where)
    if not isinstance(given.setdefault("settings", {}), Mapping):
        raise StudyError(f"{where}: settings must be options of a run and their values, got {given['settings']!r}.")
    if not isinstance(given.get("name"), str) or not given["name"].strip():
        raise StudyError(f"{where}: the study has no name.")
    try:
        return Grid(**given)
    except StudyError as why:
        raise StudyError(f"{where}: {why}") from why
    except (SelectuneError, TypeError, ValueError, AttributeError) as why:
        raise StudyError(f"{where}: a cell of the study cannot be run: {why}") from why


def _search(told: Any, where: str) -> Search:
    known = [f.name for f in dataclasses.fields(Search)]
    if not isinstance(told, Mapping) or not set(told) <= set(known):
        raise StudyError(f"{where}: search takes {', '.join(known)}, got {told!r}.")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    search = Search(**given)
    lists = all(isinstance(value, tuple) for value in (search.factors, search.seeds))
    positive = lists and search.factors and all(type(f) in (int, float) and 0 < f < math.inf for f in search.factors)
    if not positive or not search.seeds or not all(type(seed) is int for seed in search.seeds):
        raise StudyError(f"{where}: search needs a list of factors above 0 and one of integer seeds, got {told!r}.")
    return search


def _budget(told: Any, where: str) -> int | float | str:
    """A budget as the command line reads it."""
    try:
        return told if not isinstance(told, str) or told.partition(":")[0] in KINDS else spec.budget(told)
    except SelectuneError as why:
        raise StudyError(f"{where}: {why}") from why


STUDY = "study.json"
_SHIPPED = Path(__file__).parent / "grids"


def names() -> list[str]:
    """The studies that ship with selectune."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_grid(path: str | os.PathLike[str], twin: bool = False) -> Grid:
    """The grid in a YAML or JSON file, in a study's folder, or of a name in `names()`.

    `twin`: its small form, in which everything that the file's `twin` names takes the place of what it has else.
    Raises StudyError, which names the file.
    """
    place = Path(path) / STUDY if Path(path).is_dir() else Path(path)
    if not place.exists() and os.fspath(path) in names():
        place = _SHIPPED / f"{path}.yaml"
    if not place.exists():
        raise StudyError(
            f"{place}: there is no such file, and no study of this name ships with selectune. These do: "
            f"{', '.join(names())}.{did_you_mean(os.fspath(path), names())}"
        )
    told = read_document(place, error=StudyError, limit=_LIMIT)
    if isinstance(told, Mapping) and isinstance(told.get("grid"), Mapping):
        told = told["grid"]
    if isinstance(told, Mapping):
        small = told.get("twin")
        told = {key: value for key, value in told.items() if key != "twin"}
        if twin:
            if not isinstance(small, Mapping):
                raise StudyError(f"{place} has no twin: a small form of the study.")
            told |= {"name": f"{told.get('name')}-twin", **small}
    return of_mapping(told, str(place))
