"""What a report is made of: the results of a study or of one run, as they lie in its folder."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune.errors import SelectuneError, StudyError
from selectune.files.reading import read_json
from selectune.runs.folder import RUN_FILE
from selectune.study.grid import STUDY
from selectune.study.records import RESULTS, Record, Setting, read_results
from selectune.study.workspace import CELLS, Workspace, named_now

LARGEST = 1 << 26
"""Bytes of a run.json with its history."""

_FAULTS = (KeyError, TypeError, ValueError, AttributeError)  # of a file that is JSON, but not of a run


@dataclass(frozen=True)
class Material:
    """A study, or one run as a study of one cell.

    `logs`: {key of a cell: its history, as run.json has it}. `notes`: sentences about what is missing. `single`: one
    run. `search`: the results of trial rates, which are not in `records`.
    """

    folder: Path
    title: str
    question: str
    single: bool
    records: tuple[Record, ...]
    search: tuple[Record, ...]
    logs: Mapping[str, Sequence[Mapping[str, Any]]]
    notes: tuple[str, ...]

    def place(self, cell: str) -> Path:
        """The folder of a cell's run."""
        return self.folder if self.single else self.folder / CELLS / cell

    @property
    def runs(self) -> tuple[Record, ...]:
        """The last record of every run."""
        return tuple(record for record in self.records if record.last)


def gather(folder: Path) -> Material:
    """Reads the folder of a study or of a run. Raises StudyError if it is neither, or holds no finished run."""
    if (folder / RESULTS).is_file() or (folder / STUDY).is_file():
        return _study(folder)
    if (folder / RUN_FILE).is_file():
        return _run(folder)
    what = "is neither a study nor a finished run" if folder.is_dir() else "is no folder"
    raise StudyError(
        f"{folder} {what}. A report is made of a study's folder, which holds {RESULTS}, or of a run's, which holds "
        f"{RUN_FILE}."
    )


def number(told: Mapping[str, Any], name: str) -> float | None:
    """A finite number in a mapping, or None."""
    value = told.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return value


def _study(folder: Path) -> Material:
    told = read_json(folder / STUDY, error=StudyError) if (folder / STUDY).exists() else {}
    told = told if isinstance(told, Mapping) else {}
    read = [_checked(record, folder / RESULTS) for record in _named(folder, read_results(folder / RESULTS))]
    notes = [*_cut(folder / RESULTS)]
    records = tuple(record for record in read if record.phase == "main")
    done = {record.cell for record in read if record.last}
    begun = {path.name for path in (folder / CELLS).iterdir()} if (folder / CELLS).is_dir() else set()
    if not any(record.last for record in records):
        raise StudyError(
            f"{folder} has no finished run that counts yet: {len(begun - done):,} cells have begun and {len(done):,} "
            "trial rates are done. Go on with it (`selectune study run`), and ask for the report then."
        )
    if open_ := (begun | {record.cell for record in records}) - done:
        notes.append(f"{_cells(len(open_))} not finished; only finished ones count here.")
    logs: dict[str, Sequence[Mapping[str, Any]]] = {}
    for record in records:
        path = folder / CELLS / record.cell / RUN_FILE
        if record.last and path.is_file():
            told_run = read_json(path, limit=LARGEST, error=StudyError)
            logs[record.cell] = _history(told_run) if isinstance(told_run, Mapping) else ()
    if gone := sum(record.last and record.steps > 0 and record.cell not in logs for record in records):
        notes.append(f"{_cells(gone)} finished, but without a {RUN_FILE} in {CELLS}/: no losses are shown of them.")
    return Material(
        folder, str(told.get("name") or folder.resolve().name), str(told.get("question") or ""), False, records,
        tuple(record for record in read if record.phase != "main"), logs, tuple(notes),
    )  # fmt: skip


def _named(folder: Path, records: list[Record]) -> list[Record]:
    """The records with the names that the study's grid gives them now; as they are where there is no grid to read."""
    with contextlib.suppress(SelectuneError):
        return named_now(records, Workspace(folder).cells(records))
    return records


def _cells(count: int) -> str:
    return f"{count:,} cells are" if count > 1 else "1 cell is"


def _cut(path: Path) -> list[str]:
    """A note if the last line of the results was cut off."""
    if not path.is_file() or path.stat().st_size == 0:
        return []
    with open(path, "rb") as file:
        file.seek(-1, 2)
        whole = file.read(1) == b"\n"
    return [] if whole else [f"The last line of {path.name} was cut off while it was written, and is left out."]


def _checked(record: Record, path: Path) -> Record:
    numbers = {name: getattr(record, name) for name in ("value", "lr", "seed", "step", "steps", "selected", "examples")}
    wrong = next((name for name in numbers if number(numbers, name) is None), None)
    texts = (record.cell, record.metric, *(getattr(record.setting, name) for name in ("model", "task", "method")))
    if wrong is not None or not all(isinstance(text, str) for text in texts) or not isinstance(record.more, Mapping):
        raise StudyError(f"{path}: the result of cell {record.cell!a} has {wrong or 'a name'} of the wrong kind.")
    if Path(record.cell).name != record.cell:
        raise StudyError(f"{path}: {record.cell!a} is no key of a cell; it must be the name of a folder in {CELLS}/.")
    return record


def _run(folder: Path) -> Material:
    path = folder / RUN_FILE
    told = read_json(path, limit=LARGEST, error=StudyError)
    try:
        config, history = told["config"], _history(told)
        setting = Setting(config["model"], told["task"], told["method"], config.get("on"), config.get("budget"))
        values = [told["value"], *(entry["metric"] for entry in history if "metric" in entry)]
        best = told.get("best")
        lowest = best is not None and any(best["value"] < value for value in values)
        forgetting = (told.get("retention") or {}).get("forgetting")
        more = {name: told.get(name) for name in ("trained", "changed", "budget", "seconds", "delta_bytes", "run")}
        more |= {"kind": told.get("kind"), "versions": told.get("versions"), "others": told.get("others") or {}}
        more |= {} if forgetting is None else {"forgetting": forgetting}
        same = {"lr": config.get("lr") or _rate(history), "seed": config["seed"], "metric": told["metric"]}
        same |= {"lowest": lowest, "steps": told["steps"], "examples": told["examples"]}
        cell = folder.resolve().name
        last = Record(
            cell, "main", setting, **same, step=told["steps"], value=told["value"], selected=told["selected"],
            last=True, more=more,
        )  # fmt: skip
        way = [
            Record(cell, "main", setting, **same, step=e["step"], value=e["metric"], selected=e["selected"], last=False)
            for e in history
            if "metric" in e
        ]
        records = tuple(_checked(record, path) for record in (*way, last))
    except _FAULTS as why:
        raise StudyError(f"{path} is not the record of a finished run: {type(why).__name__} at {why}.") from why
    title = f"{setting.method} on {setting.task}"
    return Material(folder, title, "", True, records, (), {cell: history}, ())


def _history(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = told.get("history")
    entries = found if isinstance(found, list) else []
    return [
        {name: value for name in entry if (value := number(entry, name)) is not None}
        for entry in entries
        if isinstance(entry, Mapping) and number(entry, "step") is not None
    ]


def _rate(history: Sequence[Mapping[str, Any]]) -> float:
    """The highest learning rate of the log: the run's own, where its config left it to the method."""
    return max((entry["learning_rate"] for entry in history if "learning_rate" in entry), default=0.0)
