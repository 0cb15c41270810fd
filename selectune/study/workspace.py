"""The folder of a study: what was asked, what is done, what failed. One process at a time runs in it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from selectune.errors import StudyError
from selectune.files import own, read_json, read_lines, write_durably
from selectune.runs.folder import RESULTS as OF_A_RUN
from selectune.study.cells import Cell
from selectune.study.grid import STUDY, Arm, Grid, of_mapping, setting_of
from selectune.study.records import RESULTS, Record, line_of, read_results

CELLS, FAILURES = "cells", "failures.jsonl"
CELL, DONE, LOG = "cell.json", "result.json", "log.txt"
"""In the folder of a cell: what it is, its records once it is done, and what its process said."""

DIVERGED = "NonFiniteError"
_LIMIT = 1 << 26


@dataclass(frozen=True)
class Failure:
    """An attempt at a cell that ended without a result: the error's class, or how the process ended, and its words."""

    cell: str
    kind: str
    why: str


@dataclass(frozen=True)
class Left:
    """What is to do: cells that can run now, in order, and how many wait for a rate that is not found yet.

    `done`: cells that have a result, or diverged: another attempt would diverge too.
    """

    ready: Sequence[Cell]
    waiting: int
    done: int


class Workspace:
    """A study's folder. Reading needs nothing but the folder; writing needs `owned`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        file = self.path / STUDY
        if not file.exists():
            raise StudyError(f"{self.path} holds no study: there is no {STUDY} in it. `selectune study run` makes one.")
        told = read_json(file, limit=_LIMIT, error=StudyError)
        if not isinstance(told, dict) or "grid" not in told:
            raise StudyError(f"{file} holds no grid.")
        self.grid: Grid = of_mapping(told["grid"], str(file))

    def folder(self, key: str) -> Path:
        return self.path / CELLS / key

    def records(self) -> list[Record]:
        """The results of all cells that the grid has, in the grid's order of cells. Others stay in the file only.

        So tables do not depend on when cells ended. Methods and tasks have the names that the grid gives them now.
        """
        found = read_results(self.path / RESULTS)
        cells = self.cells(found)
        place = {cell.key: i for i, cell in enumerate(cells)}
        return named_now(sorted((r for r in found if r.cell in place), key=lambda r: place[r.cell]), cells)

    def failures(self) -> list[Failure]:
        """The attempts that failed, in their order."""
        path = self.path / FAILURES
        lines = read_lines(path, error=StudyError) if path.exists() else ()
        try:
            return [Failure(row["cell"], row["kind"], row["why"]) for _, row in lines]
        except (TypeError, KeyError) as why:
            raise StudyError(f"{path} has a line that tells no failed attempt: {why}.") from why

    def cells(self, results: Sequence[Record]) -> list[Cell]:
        """All cells that are known by now, in an order whose stop leaves whole tasks and balanced rows of the next one.

        Task by task, trials come first, and then the runs of one seed after another.
        """
        found: list[Cell] = []
        tasks: dict[str, list[tuple[Arm, float | None]]] = {}
        for arm, rate in self.rates(results):
            tasks.setdefault(arm.setting.task, []).append((arm, rate))
        for arms in tasks.values():
            found += [cell for arm, _ in arms for cell in self.grid.trials(arm)]
            runs = [self.grid.cells(arm, rate) for arm, rate in arms if rate or not self.grid.trials(arm)]
            rounds = max((len(cells) for cells in runs), default=0)
            found += [cells[i] for i in range(rounds) for cells in runs if i < len(cells)]
        return found

    def rates(self, results: Sequence[Record]) -> list[tuple[Arm, float | None]]:
        """Each arm with the best rate of its trials: of the highest mean value; None while trials are missing.

        A trial that diverged has no value, and its rate is out. An arm without a search has None too.
        """
        last = {record.cell: record for record in results if record.last and record.phase == "search"}
        diverged = self._diverged()
        seeds = len(self.grid.search.seeds) if self.grid.search else 0
        found: list[tuple[Arm, float | None]] = []
        for arm in self.grid.arms:
            values: dict[float, list[float]] = {}
            trials = self.grid.trials(arm)
            for cell in trials:
                if cell.key in last:
                    record = last[cell.key]
                    values.setdefault(record.lr, []).append(-record.value if record.lowest else record.value)
            whole = {lr: sum(v) / len(v) for lr, v in values.items() if len(v) == seeds}
            missing = any(cell.key not in last and cell.key not in diverged for cell in trials)
            found.append((arm, None if missing or not whole else max(whole, key=lambda lr: (whole[lr], -lr))))
        return found

    def left(self) -> Left:
        """What is to do, and how much is done."""
        results = read_results(self.path / RESULTS)
        ended = {record.cell for record in results if record.last} | self._diverged()
        known = self.cells(results)
        ready = [cell for cell in known if cell.key not in ended]
        waiting = sum(
            len(self.grid.cells(arm, None)) for arm, rate in self.rates(results) if self.grid.trials(arm) and not rate
        )
        return Left(ready, waiting, len(known) - len(ready))

    def at_the_edge(self) -> list[tuple[Arm, float]]:
        """Arms whose best rate is the lowest or the highest that was tried: a better one may lie beyond."""
        found: list[tuple[Arm, float]] = []
        for arm, rate in self.rates(read_results(self.path / RESULTS)):
            tried = sorted({cell.config.learning_rate for cell in self.grid.trials(arm)})
            if rate is not None and len(tried) > 1 and rate in (tried[0], tried[-1]):
                found.append((arm, rate))
        return found

    def _diverged(self) -> set[str]:
        return {failure.cell for failure in self.failures() if failure.kind == DIVERGED}

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Owns the folder while the block runs. A result that was cut as its writer died is cut off."""
        with own(self.path, secrets.token_hex(8)):
            for name in (RESULTS, FAILURES):
                _mend(self.path / name)
            yield

    def prepare(self, cell: Cell) -> Path:
        """The folder of a cell, with the file that says what it is."""
        folder = self.folder(cell.key)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {**cell.settings, "out": str(folder)}
        told = {"key": cell.key, "phase": cell.phase, "settings": settings, "measure": cell.measure}
        told |= {"name": cell.name, "title": cell.title}
        write_durably(folder / CELL, json.dumps(told, indent=1).encode())
        return folder

    def finished(self, cell: Cell) -> bool:
        """Takes the records of a cell that is done into the results. False if it left none."""
        path = self.folder(cell.key) / DONE
        if not path.exists():
            return False
        told = read_json(path, limit=_LIMIT, error=StudyError)
        try:
            records = [Record.of_json(row) for row in told["records"]]
        except (TypeError, KeyError) as why:
            raise StudyError(f"{path} holds no results of a cell: {why}. Delete it to run the cell again.") from why
        _append(self.path / RESULTS, "".join(map(line_of, records)))
        if cell.phase == "search":
            (self.folder(cell.key) / OF_A_RUN[1]).unlink(missing_ok=True)
        for checkpoint in self.folder(cell.key).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return True

    def failed(self, failure: Failure) -> None:
        _append(self.path / FAILURES, json.dumps(vars(failure)) + "\n")


def named_now(records: Sequence[Record], cells: Sequence[Cell]) -> list[Record]:
    """The records with the names that these cells have now in tables; those of other cells as they are.

    What a cell was measured on beside its own task keeps that task's name.
    """
    told = {cell.key: (setting_of(cell), cell.measure) for cell in cells}

    def named(record: Record) -> Record:
        if record.cell not in told:
            return record
        setting, measured = told[record.cell]
        task = record.setting.task
        return replace(record, setting=replace(setting, task=task) if task in measured else setting)

    return [named(record) for record in records]


def begin(path: str | os.PathLike[str], grid: Grid) -> Workspace:
    """A study's folder, new or the same as before. Another grid may take its place if the name is the same.

    Cells that both have are not run again. Raises StudyError for a folder with a study of another name, and
    RunFolderError for one in which a study runs now.
    """
    told = {"name": grid.name, "question": grid.question, "grid": grid.as_json()}
    with own(path, secrets.token_hex(8)) as folder:
        if (folder / STUDY).exists():
            there = Workspace(folder).grid
            if there.name != grid.name:
                raise StudyError(f"{folder} holds the study {there.name}, not {grid.name}. Give another folder.")
        elif any(entry.name != ".selectune.lock" for entry in folder.iterdir()):
            raise StudyError(f"{folder} holds other files and no study. Give an empty or a new folder.")
        write_durably(folder / STUDY, json.dumps(told, indent=1).encode())
        return Workspace(folder)


def _append(path: Path, text: str) -> None:
    """Appends lines by one write, and flushes them."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        data = memoryview(text.encode())
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _mend(path: Path) -> None:
    """Cuts off a last line without an end."""
    with contextlib.suppress(FileNotFoundError):
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def told_of(cell: Cell) -> str:
    """A cell in a few words: what differs between cells.

    >>> told_of(Cell("main", {"model": "demo", "task": "glue/rte", "method": "id3", "budget": 1000, "seed": 3}))
    'demo glue/rte id3 1,000 seed 3 lr 0.0005'
    """
    setting, config = setting_of(cell), cell.config
    told = f"{os.path.basename(setting.model)} {setting.task} {setting.row} seed {config.seed}"
    return told if cell.untuned else f"{told} lr {config.learning_rate:g}"
