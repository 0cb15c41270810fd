"""The task, and the source of its rows: a folder of JSON lines, the hub, or a generator."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from selectune.errors import TaskError
from selectune.files import read_lines

DATA = "SELECTUNE_DATA"
"""Environment variable that names a folder of tasks; `--data` takes precedence."""

MAX_LABEL = 1e15
"""Largest score of a regression, whose square still fits a float32."""

Metric = Callable[[Sequence[float], Sequence[float]], float]


class Example(NamedTuple):
    """One row: one or two texts, and a class number or a score."""

    texts: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class Split:
    """The rows of one split, and their origin: a file, a hub revision or a generator."""

    examples: tuple[Example, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class Hub:
    """A task's place on the Hugging Face hub; `revision` is a commit, so that rows never change."""

    path: str
    config: str
    revision: str


@dataclass(frozen=True)
class Task:
    """A benchmark: its rows, its metric, its chance level and its source.

    `folders`: places below a data folder, tried in order. `fields`: the texts of a row, one or two. `chance`: the score
    of the best constant answer on the validation split. `epochs`, `eval_every` (steps) and `max_length` (tokens) are
    the papers' settings. `generate(split)` replaces files and hub.

    >>> import selectune.tasks as tasks
    >>> tasks.get("glue/rte").labels
    ('entailment', 'not_entailment')
    """

    name: str
    fields: tuple[str, ...]
    kind: str  # "classification" or "regression"
    labels: tuple[str, ...]  # class names by number; empty for a regression
    metric: Metric
    metric_name: str
    chance: float
    source: str
    epochs: int
    eval_every: int
    max_length: int = 256
    hub: Hub | None = None
    folders: tuple[str, ...] = ()
    train: str = "train"
    validation: str = "validation"
    label: str = "label"
    generate: Callable[[str], Sequence[Mapping[str, Any]]] | None = None

    @property
    def outputs(self) -> int:
        """How many numbers a model's head computes for one row."""
        return max(1, len(self.labels))

    def score(self, predictions: Sequence[float], labels: Sequence[float]) -> float:
        """The metric of some predictions; refuses lists of different or no length."""
        if len(predictions) != len(labels) or not len(labels):
            raise TaskError(
                f"The metric of {self.name} needs as many predictions as labels and at least one; "
                f"got {len(predictions)} and {len(labels)}."
            )
        return float(self.metric(predictions, labels))


def load(task: Task, split: str, data: str | os.PathLike[str] | None = None, limit: int | None = None) -> Split:
    """The rows of a task's split ("train" or "validation").

    With `data`, a folder, the rows must be there. Without it they come from the folder in SELECTUNE_DATA, if it has
    them, or else from the hub through `datasets`. `limit` keeps the first rows only. A generated task needs neither.
    """
    wanted = {"train": task.train, "validation": task.validation}.get(split)
    if wanted is None:
        raise TaskError(f"Unknown split '{split}' of {task.name}. Known: train, validation.")
    if task.generate is not None:
        origin, unit, rows = "generated", "row", enumerate(task.generate(wanted), 1)
    else:
        origin, unit, rows = _find(task, wanted, data)
    examples = []
    for number, row in rows:
        if limit is not None and len(examples) == limit:
            break
        examples.append(_example(task, row, f"{origin}, {unit} {number}"))
    if not examples:
        raise TaskError(f"The {wanted} split of {task.name} has no rows ({origin}).")
    return Split(tuple(examples), origin)


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
            return str(path), "line", read_lines(path, error=TaskError)
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
    origin = f"hub {hub.path}/{hub.config}@{hub.revision}"
    try:
        rows = load_dataset(hub.path, hub.config, split=split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError) as error:  # the hub is offline or unreachable, or lacks the split
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise TaskError(
            f"{task.name} has no {split} split here: {looked}and {origin} cannot be reached ({why}). {advice}"
        ) from error
    return origin, "row", enumerate(rows, 1)


def _example(task: Task, row: Mapping[str, Any], where: str) -> Example:
    missing = [name for name in (*task.fields, task.label) if name not in row]
    if missing:
        raise TaskError(
            f"{where}: a row of {task.name} needs {', '.join((*task.fields, task.label))}; "
            f"missing: {', '.join(missing)}. Got {', '.join(map(str, row)) or 'nothing'}."
        )
    texts = tuple(row[name] for name in task.fields)
    if not all(isinstance(text, str) for text in texts):
        raise TaskError(f"{where}: the texts of {task.name} must be strings, got {texts!r:.120}.")
    label = row[task.label]
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise TaskError(f"{where}: the label of {task.name} must be a number, got {label!r:.80}.")
    if isinstance(label, float) and not math.isfinite(label):  # the metric of a whole run would fail on it
        raise TaskError(f"{where}: the label of {task.name} must be finite, got {label!r}.")
    if task.kind == "regression":
        if abs(label) > MAX_LABEL:
            raise TaskError(f"{where}: the label of {task.name} must be at most {MAX_LABEL:g}, got {label!r:.80}.")
        return Example(texts, float(label))
    if label not in range(len(task.labels)):  # 1.0 is 1: a table with gaps holds integers as floats
        raise TaskError(
            f"{where}: the label of {task.name} must be 0 to {len(task.labels) - 1} "
            f"({', '.join(task.labels)}), got {label!r:.80}."
        )
    return Example(texts, int(label))
