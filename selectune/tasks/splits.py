"""The rows of a task: of a folder of JSON lines, the hub, or a generator."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune.errors import TaskError
from selectune.files import read_lines
from selectune.tasks.task import Example, Row, Task

DATA = "SELECTUNE_DATA"
"""Environment variable that names a folder of tasks; `--data` takes precedence."""

LONGEST = 8 << 20
"""Bytes of the longest row, such as a whole novel."""


@dataclass(frozen=True)
class Split:
    """The rows of one split, and their origin: a file, a hub revision or a generator."""

    examples: tuple[Example, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.examples)


def load(task: Task, split: str, data: str | os.PathLike[str] | None = None, limit: int | None = None) -> Split:
    """The rows of a task's split ("train" or "validation").

    With `data`, a folder, the rows must be there. Without it they come from the folder in SELECTUNE_DATA, if it has
    them, or else from the hub through `datasets`. `limit` keeps the first rows only. A generated task needs neither.
    """
    wanted = {"train": task.train, "validation": task.validation}.get(split)
    if wanted is None:
        raise TaskError(f"Unknown split '{split}' of {task.name}. Known: train, validation.")
    read = _of_parts(task, data, limit) if task.parts else _read(task, wanted, data, limit)
    examples = read.examples if task.arrange is None else tuple(task.arrange(read.examples, split))
    if not examples:
        raise TaskError(f"The {wanted} split of {task.name} has no rows ({read.origin}).")
    return Split(examples, read.origin)


def _of_parts(task: Task, data: str | os.PathLike[str] | None, limit: int | None) -> Split:
    """The training rows of a task's parts, one after another."""
    parts = [load(part, "train", data, limit) for part in task.parts]
    examples = tuple(example for part in parts for example in part.examples)
    return Split(examples[:limit], " and ".join(part.origin for part in parts))


def _read(task: Task, split: str, data: str | os.PathLike[str] | None, limit: int | None) -> Split:
    """The rows of a split as they are published."""
    if task.generate is not None:
        origin, unit, rows = "generated", "row", enumerate(task.generate(split), 1)
    else:
        origin, unit, rows = _find(task, split, data)
    examples: list[Example] = []
    for number, row in rows:
        if limit is not None and len(examples) == limit:
            break
        where = f"{origin}, {unit} {number}"
        examples.append(task.kind.example(task, _prepared(task, row, where), where))
    return Split(tuple(examples), origin)


def _prepared(task: Task, row: Row, where: str) -> Row:
    """The row with the task's fields. A row that `prepare` cannot read is a TaskError."""
    if task.prepare is None:
        return row
    try:
        return task.prepare(row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise TaskError(
            f"{where}: not a row of {task.name} as {task.source.partition(';')[0]} gives them "
            f"({type(error).__name__}: {error}). It has {', '.join(map(str, row)) or 'nothing'}."
        ) from error


Numbered = Iterable[tuple[int, Any]]


def _find(task: Task, split: str, data: str | os.PathLike[str] | None) -> tuple[str, str, Numbered]:
    """The origin of a split, "line" or "row", and its numbered rows."""
    named = (os.environ.get(DATA) or None) if data is None else data
    root = None if named is None else Path(named)
    if data is not None and root is not None and not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise TaskError(f"The data folder {root} {what}. --data takes a folder of task/split.jsonl(.gz).")
    places = [] if root is None else [root / folder / f"{split}.jsonl" for folder in task.folders]
    for path in (each for place in places for each in (place, place.with_name(place.name + ".gz"))):
        if path.is_file():
            return str(path), "line", read_lines(path, error=TaskError, line_limit=LONGEST)
    tried = ", ".join(map(str, places))
    if data is not None:
        there = ", ".join(sorted(path.name for place in places for path in place.parent.glob("*.jsonl*")))
        raise TaskError(
            f"The data folder {root} has no {split} split of {task.name}; looked for {tried} (and .gz). "
            f"{f'There is {there}. ' if there else ''}Add that file, or leave --data out to ask {DATA} and the hub."
        )
    return _from_hub(task, split, tried)


def _from_hub(task: Task, split: str, tried: str) -> tuple[str, str, Numbered]:
    looked = f"looked for {tried}, " if tried else f"{DATA} is not set, "
    advice = (
        f"Give a folder that holds {task.folders[0] if task.folders else task.name}/{split}.jsonl with --data or "
        f"{DATA}, or allow the hub (no HF_HUB_OFFLINE, a connection)."
    )
    if task.hub is None:
        raise TaskError(f"{task.name} has no {split} split here: {looked}and it is not on the hub. {advice}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TaskError(
            f"{task.name} has no {split} split here: {looked}and the package `datasets` that fetches it from the hub "
            f"is not installed (pip install 'selectune[hf]'). {advice}"
        ) from error
    hub = task.hub
    origin = f"hub {hub.path}{f'/{hub.config}' if hub.config else ''}@{hub.revision}"
    try:
        rows = load_dataset(hub.path, hub.config, split=split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError) as error:  # the hub is offline or unreachable, or lacks the split
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise TaskError(
            f"{task.name} has no {split} split here: {looked}and {origin} cannot be reached ({why}). {advice}"
        ) from error
    return origin, "row", enumerate(rows, 1)
