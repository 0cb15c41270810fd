"""A study in numbers: what is done, a table of methods and tasks, a file for other tools, a forecast."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune.errors import ConfigError, SelectuneError
from selectune.study.cells import Cell
from selectune.study.grid import Arm, Grid
from selectune.study.records import Record, Setting, of_runs
from selectune.study.workspace import Workspace

FORMATS = ("parquet", "csv", "jsonl")


@dataclass(frozen=True)
class Status:
    """How far a study is. `edges`: arms whose best rate is the lowest or the highest that was tried."""

    name: str
    question: str
    done: int
    ready: int
    waiting: int
    failures: Sequence[str]
    edges: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def status(workspace: Workspace) -> Status:
    left, grid = workspace.left(), workspace.grid
    edges = [f"{named(arm)} lr {rate:g}" for arm, rate in workspace.at_the_edge()]
    failures = [f"{failure.kind}: {failure.why}" for failure in workspace.failures()]
    return Status(grid.name, grid.question, left.done, len(left.ready), left.waiting, failures, edges)


def named(arm: Arm) -> str:
    """An arm in words: its task, and its method with adapter and budget."""
    return f"{arm.setting.task}  {arm.setting.row}"


def table(records: Sequence[Record], rule: str = "last") -> tuple[list[str], list[list[str]]]:
    """Column names and rows: a row for each method, a column for each task (and model), mean ± spread (runs)."""
    found = of_runs(records, rule)
    models = {setting.model for setting in found}
    columns, rows = {}, {}
    for setting, runs in found.items():
        column = setting.task if len(models) == 1 else f"{setting.task} ({setting.model})"
        columns.setdefault(column, None)
        values = list(runs.values())
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        row = rows.setdefault(setting.row, {})
        row[column] = f"{statistics.fmean(values):.4f}{spread} ({len(values)})"
    body = [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return ["method", *columns], body


def export(records: Sequence[Record], path: Path) -> None:
    """Writes the records, a row each, as the name's end says: .parquet, .csv or .jsonl."""
    kind = path.suffix.lstrip(".")
    if kind not in FORMATS:
        raise ConfigError(f"{path}: results are exported as {', '.join('.' + name for name in FORMATS)}.")
    try:
        import pandas
    except ImportError as error:
        raise ConfigError("To export results needs pandas and pyarrow: pip install 'selectune[study]'.") from error
    frame = pandas.json_normalize([record.as_json() for record in records], sep="_")
    if any(isinstance(record.setting.budget, str) for record in records):  # a column has one type
        frame["setting_budget"] = [None if b is None else str(b) for b in (r.setting.budget for r in records)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        frame.to_parquet(path, index=False)
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)


@dataclass(frozen=True)
class Forecast:
    """What a study will take. `seconds`: None where no cell like it has been run; `peak`: bytes of the largest cell."""

    trials: int
    runs: int
    seconds: float | None
    peak: int | None
    measured: int
    arms: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def forecast(grid: Grid, records: Sequence[Record] = ()) -> Forecast:
    """The cells of a grid, the time of those that are left, and the memory of the largest by `selectune plan`.

    A cell that is not done takes as long as the mean of those of the same task and method, else of the same task.
    """
    took: dict[tuple[str, ...], list[float]] = {}
    done: Counter[Setting] = Counter()
    for record in records:
        if record.last and record.more.get("seconds"):  # not of another task that the same run was measured on
            done[record.setting] += 1
            for like in ((record.setting.task, record.setting.method), (record.setting.task,)):
                took.setdefault(like, []).append(record.more["seconds"])
    trials = sum(len(grid.trials(arm)) for arm in grid.arms)
    runs = total = 0
    known = True
    for arm in grid.arms:
        cells = len(grid.cells(arm, None)) + len(grid.trials(arm))
        runs += len(grid.cells(arm, None))
        like = took.get((arm.setting.task, arm.setting.method)) or took.get((arm.setting.task,))
        known = known and bool(like)
        total += max(0, cells - done[arm.setting]) * statistics.fmean(like) if like else 0.0
    peaks = [peak for arm in grid.arms if (peak := _peak(arm.settings)) is not None]
    measured = done.total()
    return Forecast(
        trials, runs, total if known else None, max(peaks, default=None), measured, [*map(named, grid.arms)]
    )


def _peak(settings: Any) -> int | None:
    cell = Cell("main", settings)
    if cell.untuned:
        return None
    config = cell.config
    length = config.max_length or config.the_task.max_length or 256
    budget = 0.0017 if config.budget is None else config.budget  # methods without one do not read it
    return _planned(config.model, config.batch_size, length, config.method, budget, config.on)


@functools.cache
def _planned(model: str, batch: int, length: int, method: str, budget: Any, on: str | None) -> int | None:
    """The peak of a cell's live tensors in bytes, as `selectune plan` has it; None where it cannot tell."""
    from selectune.bench.estimate import plan
    from selectune.bench.workload import Bench

    try:
        return plan(Bench(model, batch, length), method, budget, None, "adamw", on).peak
    except SelectuneError:
        return None
