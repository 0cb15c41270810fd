"""Runs a study: starts cells as there is room, takes their results, tries again what failed by accident."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selectune.errors import SelectuneError, StoppedError, StudyError
from selectune.files import read_json
from selectune.runs.stop import Stop
from selectune.study.attempt import ERROR, REFUSED, STOPPED
from selectune.study.cells import Cell
from selectune.study.engines import Executor
from selectune.study.workspace import DIVERGED, LOG, Failure, Workspace, told_of

_BETWEEN = 0.5  # seconds between two looks at a request to stop


@dataclass(frozen=True)
class Counts:
    """Cells of a study: done, failed for good in this run, running now, ready, and waiting for a rate."""

    done: int
    failed: int
    running: int
    ready: int
    waiting: int

    @property
    def all(self) -> int:
        return sum(vars(self).values())


class Watcher(Protocol):
    """Follows a study while it runs."""

    def start(self, counts: Counts) -> None: ...
    def began(self, cell: Cell) -> None: ...
    def ended(self, cell: Cell, failure: Failure | None, counts: Counts) -> None: ...
    def stop(self) -> None: ...


def run_study(
    workspace: Workspace,
    engine: Executor,
    retries: int = 1,
    watcher: Watcher | None = None,
    stop: Stop | None = None,
    most: int | None = None,
) -> Counts:
    """Runs all cells that are not done. Done ones are never run again; others go on from their checkpoints.

    `retries`: further attempts at a cell whose process died or raised; an error of selectune's own would be raised
    again and is not retried. `most`: end after so many cells. `stop`: when it is asked, cells end their step, write
    their checkpoints, and StoppedError is raised. RunFolderError: another process runs this study.
    """
    stop = stop or Stop()
    with workspace.owned():
        stop.listening = True
        work = _Work(workspace, engine, retries, most)
        if watcher is not None:
            watcher.start(work.counts())
        try:
            while work.fill(watcher):
                while not stop.asked and not work.collect(watcher):
                    pass
                if stop.asked:
                    told = f"{len(work.running)} cells were stopped. The same command goes on from here."
                    raise StoppedError(told, 0, stop.signal or 0)
            return work.counts()
        finally:
            stop.listening = False
            engine.stop()
            work.harvest()
            if watcher is not None:
                watcher.stop()


class _Work:
    def __init__(self, workspace: Workspace, engine: Executor, retries: int, most: int | None) -> None:
        self.workspace, self.engine, self.retries, self.most = workspace, engine, retries, most
        self.running: dict[Path, Cell] = {}
        self.attempts: Counter[str] = Counter()
        self.gone: set[str] = set()  # failed for good
        self.started = 0
        self.harvest()

    def harvest(self) -> None:
        """Takes in cells that were done as the process that ran this study died."""
        found = True
        while found:  # trials that are taken in tell which runs there are
            found = False
            for cell in self.workspace.left().ready:
                found |= self.workspace.finished(cell)

    def waiting(self) -> Sequence[Cell]:
        taken = {cell.key for cell in self.running.values()} | self.gone
        return [cell for cell in self.workspace.left().ready if cell.key not in taken]

    def counts(self) -> Counts:
        left, running = self.workspace.left(), len(self.running)
        return Counts(left.done, len(self.gone), running, len(left.ready) - running - len(self.gone), left.waiting)

    def fill(self, watcher: Watcher | None) -> bool:
        """Starts cells while there is room. False if nothing runs and nothing is left that could."""
        for cell in self.waiting():
            if len(self.running) == self.engine.slots:
                break
            if self.most is not None and self.started >= self.most and not self.attempts[cell.key]:
                continue  # another attempt at a cell is no further cell
            folder = self.workspace.prepare(cell)
            self.engine.start(folder)
            self.running[folder] = cell
            self.started += not self.attempts[cell.key]
            if watcher is not None:
                watcher.began(cell)
        return bool(self.running)

    def collect(self, watcher: Watcher | None) -> bool:
        """Takes the results of the cells that have ended; False if none has."""
        ended = self.engine.ended(_BETWEEN)
        for folder, code in ended.items():
            cell = self.running.pop(folder)
            failure = None
            if not self.workspace.finished(cell):  # a process may die after it left its results
                failure = _failure(cell, folder, code)
                self.workspace.failed(failure)
                self.attempts[cell.key] += 1
                final = code == REFUSED or self.attempts[cell.key] > self.retries
                if final and failure.kind != DIVERGED:  # which counts as done
                    self.gone.add(cell.key)
            if watcher is not None:
                watcher.ended(cell, failure, self.counts())
        return bool(ended)


def _failure(cell: Cell, folder: Path, code: int) -> Failure:
    """Why an attempt failed: the error that it left, else the last line of its log."""
    if code == REFUSED:
        with contextlib.suppress(SelectuneError, KeyError, TypeError):
            told = read_json(folder / ERROR, error=StudyError)
            return Failure(cell.key, str(told["kind"]), f"{told_of(cell)}: {told['why']}")
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines() if (folder / LOG).exists() else []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    how = f"signal {-code}" if code < 0 else "stopped" if code == STOPPED else f"exit code {code}"
    return Failure(cell.key, how, f"{told_of(cell)}: {said[:500]} ({folder / LOG})")
