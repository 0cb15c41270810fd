"""The results of a study: one line for each evaluation of a cell, appended and never changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectune.errors import StudyError
from selectune.files.reading import NotPlain, plain, raw_lines

RESULTS = "results.jsonl"
ITEMS = "items.json"
"""In the folder of a cell: a score for each validation row; see `Items`."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all seeds of a method's runs; one row, or one cell, of a table.

    `task`: its name, and the number of training rows if that was limited: "glue/rte, 50 rows".
    `budget`: as it was asked for: a count, a share, an adapter whose size it is, or None.
    """

    model: str
    task: str
    method: str
    on: str | None = None
    budget: int | float | str | None = None

    @property
    def label(self) -> str:
        """The method as a table names it, and as `--against` takes it.

        >>> Setting("demo", "glue/rte", "id3", on="lora:r=32").label
        'id3+lora:r=32'
        """
        return self.method if self.on is None else f"{self.method}+{self.on}"

    @property
    def row(self) -> str:
        """The method with its budget.

        >>> Setting("demo", "glue/rte", "id3", "lora:r=32", 0.0017).row, Setting("demo", "glue/rte", "lora:r=8").row
        ('id3+lora:r=32 0.17%', 'lora:r=8')
        """
        return self.label if self.budget is None else f"{self.label} {size_of(self.budget)}"


def size_of(budget: int | float | str | None) -> str:
    """A budget as it was asked for.

    >>> [size_of(asked) for asked in (103000, 0.0017, "lora:r=2", None)]
    ['103,000', '0.17%', 'lora:r=2', 'its own size']
    """
    if isinstance(budget, float):
        return f"{100 * budget:.4g}%"
    return "its own size" if budget is None else f"{budget:,}" if isinstance(budget, int) else budget


@dataclass(frozen=True)
class Record:
    """One evaluation of one cell: a line of `results.jsonl`.

    `cell`: its key, and `phase` "search" or "main". `lr`, `seed`: of the run. `step` of `steps`, with `selected`
    scalars then. `value` of `metric`, on `examples` rows; `lowest`: a lower value is better. `last`: the measurement of
    the saved delta, read back onto a bare base; only there, `more` has: trained, changed, budget (scalars in all),
    seconds, peak_bytes (of the whole process), delta_bytes, run (its id), forgetting (nats per token, if retention was
    asked for), others (further metrics by name), kind (of the task), threads, versions, and where nothing was trained
    (`steps` 0) the command that measures it. Of another task that the run was measured on, there are trained, run, kind
    and others, and that command: what a run took is told once.
    """

    cell: str
    phase: str
    setting: Setting
    lr: float
    seed: int
    metric: str
    lowest: bool
    step: int
    steps: int
    value: float
    selected: int
    examples: int
    last: bool
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def of_json(told: Mapping[str, Any]) -> Record:
        """Raises TypeError or KeyError for what is none."""
        record = Record(**{**told, "setting": Setting(**told["setting"])})
        for of, types in ((record, _TYPES), (record.setting, dict.fromkeys(("model", "task", "method"), str))):
            for name, type_ in types.items():
                if not isinstance(getattr(of, name), type_):
                    raise TypeError(f"{name} is {getattr(of, name)!r}")
        return record


_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("cell", "phase", "metric"), str),
    **dict.fromkeys(("seed", "step", "steps", "selected", "examples"), int),
    **dict.fromkeys(("lr", "value"), int | float),
    **dict.fromkeys(("lowest", "last"), bool),
    "more": Mapping,
}


@dataclass(frozen=True)
class Items:
    """What a run said of each validation row, in the order of the rows.

    `scores`: for a task of classes 1.0 where the prediction is right, else 0.0; None where the task has no score of a
    single row. `predictions` and `answers`: as the task's metric takes them. `measured`: the same of the tasks that the
    run was measured on beside its own, by name; runs of earlier versions lack it.
    """

    scores: Sequence[float] | None
    predictions: Sequence[Any]
    answers: Sequence[Any]
    measured: Mapping[str, Items] = field(default_factory=dict)

    @staticmethod
    def of_json(told: Any) -> Items:
        """Raises TypeError for what is none."""
        if not isinstance(told, Mapping) or not isinstance(measured := told.get("measured", {}), Mapping):
            raise TypeError("there is no mapping of scores, predictions and answers")
        return Items(**{**told, "measured": {name: Items.of_json(each) for name, each in measured.items()}})


def of_runs(records: Iterable[Record], rule: str = "last", phase: str = "main") -> dict[Setting, dict[int, float]]:
    """The score of every run, by setting and seed. `rule`: "last", the saved delta's, or "best" of all evaluations.

    Of several rates of a setting and seed (the papers' runs are a zip of rates and seeds), "last" keeps the last one.
    """
    found: dict[Setting, dict[int, float]] = {}
    for record in records:
        if record.phase != phase or (rule == "last" and not record.last):
            continue
        runs = found.setdefault(record.setting, {})
        better = min if record.lowest else max
        old = runs.get(record.seed)
        runs[record.seed] = record.value if old is None or rule == "last" else better(old, record.value)
    return found


def line_of(record: Record) -> str:
    return json.dumps(record.as_json(), allow_nan=False) + "\n"


def read_results(path: Path) -> list[Record]:
    """The records of a file in its order, each evaluation once; none if there is no file.

    A last line without an end was cut off while it was written, and is left out: its cell is not done. Raises
    StudyError, which names the line, for any other line that is no record.
    """
    found: dict[tuple[str, str, int, bool], Record] = {}
    for number, line in raw_lines(path, error=StudyError) if path.exists() else ():
        if not line.endswith(b"\n"):
            break
        try:
            record = Record.of_json(plain(line))
        except (NotPlain, TypeError, KeyError) as why:
            raise StudyError(f"{path}, line {number} is no result of a study: {why}.") from why
        found.setdefault((record.cell, record.setting.task, record.step, record.last), record)
    return list(found.values())
