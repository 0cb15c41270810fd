"""The rows of a task: of a folder of JSON lines, the hub, or a generator."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selectune.errors import TaskError
from selectune.files import read_lines
from selectune.tasks.sources import NumberedRows, from_hub
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

    @property
    def digest(self) -> str:
        """A digest of the examples in their order, 16 hex digits."""
        found = hashlib.sha256()
        for example in self.examples:
            found.update(json.dumps(example).encode())
        return found.hexdigest()[:16]


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
    if task.read is not None:
        origin, unit, rows = task.read(split)
    elif task.generate is not None:
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


def first_rows(task: Task, split: Split, size: int, seed: int = 0) -> Split:
    """The first `size` examples of an order that depends on the task and a seed only, so 10 are among 50 among 100.

    Classes have the shares that they have in the split; see `nested`. Raises TaskError if there are not so many.
    """
    if size > len(split):
        raise TaskError(
            f"{size:,} training rows are wanted (train_size or shots), and those of {task.name} are {len(split):,}."
        )
    chosen = sorted(nested(_classes(task, split), f"{task.name}/{seed}")[:size])
    return _part(split, chosen, f"{size:,} of {len(split):,} rows")


def some_rows(task: Task, split: Split, size: int | None) -> Split:
    """At most `size` rows to measure on, the same for every method and seed; None: all. See `first_rows`."""
    return split if size is None or size >= len(split) else first_rows(task, split, size)


def splits_of(task: Task, data: str | os.PathLike[str] | None, hold_out: float | None) -> dict[str, Split]:
    """The splits of a task by name. `hold_out`: validate on that share of the training rows instead."""
    if hold_out is None:
        return {name: load(task, name, data) for name in ("train", "validation")}
    return dict(zip(("train", "validation"), held_out(task, load(task, "train", data), hold_out), strict=True))


def held_out(task: Task, split: Split, share: float) -> tuple[Split, Split]:
    """The split without a share of its rows, and that share; classes keep their shares. See `nested`.

    Which rows these are depends on the task alone. Raises TaskError if no row would be left on one of the sides.
    """
    order = nested(_classes(task, split), f"{task.name}/hold-out")
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise TaskError(f"{split.origin} has {len(order):,} rows, too few to hold out {share:g} of them.")
    kept, held = sorted(order[count:]), sorted(order[:count])
    told = f"held-out share of {share:g}"
    return _part(split, kept, f"all but a {told}"), _part(split, held, f"a {told}")


def _classes(task: Task, split: Split) -> list[int]:
    return [example.label if task.labels and isinstance(example.label, int) else 0 for example in split.examples]


def _part(split: Split, rows: Sequence[int], what: str) -> Split:
    return Split(tuple(split.examples[i] for i in rows), f"{split.origin}, {what}")


def nested(classes: Sequence[Hashable], seed: str) -> list[int]:
    """An order of rows in which every beginning has the shares of the classes, as nearly as whole rows allow.

    Each class is shuffled by the seed. Its k-th of n rows, from 0, gets the place (k + 1/2) / n between 0 and 1, and
    rows are sorted by place. This is stratified sampling with proportional shares, one class beside the other.

    >>> sorted("aabb"[i] for i in nested("aabb", "seed")[:2])
    ['a', 'b']
    """
    rng, members = random.Random(seed), defaultdict(list)
    for i, name in enumerate(classes):
        members[name].append(i)
    places: list[tuple[float, float, int]] = []
    for rows in members.values():
        rng.shuffle(rows)
        places += [((k + 0.5) / len(rows), rng.random(), i) for k, i in enumerate(rows)]
    return [i for _, _, i in sorted(places)]


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


def _find(task: Task, split: str, data: str | os.PathLike[str] | None) -> NumberedRows:
    """The rows of a split, from a folder or the hub."""
    named = (os.environ.get(DATA) or None) if data is None else data
    root = None if named is None else Path(named)
    if data is not None and root is not None and not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise TaskError(f"The data folder {root} {what}. --data takes a folder of task/split.jsonl(.gz).")
    places = [] if root is None else [root / folder / f"{split}.jsonl" for folder in task.folders]
    for path in (each for place in places for each in (place, place.with_name(place.name + ".gz"))):
        if path.is_file():
            return NumberedRows(str(path), "line", read_lines(path, error=TaskError, line_limit=LONGEST))
    tried = ", ".join(map(str, places))
    if data is not None:
        there = ", ".join(sorted(path.name for place in places for path in place.parent.glob("*.jsonl*")))
        raise TaskError(
            f"The data folder {root} has no {split} split of {task.name}; looked for {tried} (and .gz). "
            f"{f'There is {there}. ' if there else ''}Add that file, or leave --data out to ask {DATA} and the hub."
        )
    return _from_hub(task, split, tried)


def _from_hub(task: Task, split: str, tried: str) -> NumberedRows:
    looked = f"looked for {tried}, " if tried else f"{DATA} is not set, "
    advice = (
        f"Give a folder that holds {task.folders[0] if task.folders else task.name}/{split}.jsonl with --data or "
        f"{DATA}, or allow the hub (no HF_HUB_OFFLINE, a connection)."
    )
    if task.hub is None:
        raise TaskError(f"{task.name} has no {split} split here: {looked}and it is not on the hub. {advice}")
    try:
        return from_hub(task.hub, split)
    except TaskError as error:
        raise TaskError(f"{task.name} has no {split} split here: {looked}and {error} {advice}") from error
