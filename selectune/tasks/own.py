"""A task of the user's own: files of rows and the names of their columns, without code."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from selectune.errors import ConfigError, TaskError, did_you_mean
from selectune.files.reading import short, some
from selectune.tasks.kinds import KINDS
from selectune.tasks.metrics import accuracy, multilabel_f1, pearson_spearman
from selectune.tasks.sources import NumberedRows, read_rows
from selectune.tasks.splits import nested
from selectune.tasks.task import Metric, Row, Task

OWN = "own"
"""The name of such a task; a delta that was trained on one records it."""

FEW = 20
"""The most different integers that are taken for classes; beyond it they are scores."""

Numbered = Sequence[tuple[int, Row]]


class _Form(NamedTuple):
    """What a kind needs beside `TaskKind`: its metric, a label of a row, and the score of the best constant answer."""

    metric: Metric
    metric_name: str
    label: Callable[[Any, tuple[str, ...]], Any]  # raises ValueError with what is wanted
    blank: Callable[[tuple[str, ...]], Any]  # stands in for the label of a row that has none
    chance: Callable[[Sequence[Any]], float] = lambda labels: 0.0
    classes: Callable[[Any], Sequence[Any]] | None = None  # the class names of a row, if the kind has classes


@dataclass(frozen=True)
class OwnRows:
    """Rows of a user's own. `train`, `validation`: files or places on the hub; `text`, `label`: names of columns.

    `kind`: a name in `KINDS`; by default it follows from the labels. `hold_out`: a share of the training rows that is
    validated on in place of `validation`, drawn with the shares of the labels kept, the same whenever it is drawn.
    """

    train: str | None
    validation: str | None
    text: tuple[str, ...]
    label: str | None
    kind: str | None = None
    hold_out: float | None = None

    def task(self, labels: Sequence[str] | None = None) -> Task:
        """The task, with every row checked. `labels`: the class names by number; by default those that occur.

        Raises TaskError, which names file and line, for a row that does not fit, and ConfigError for labels of which
        no kind can be told.
        """
        known, splits = self._splits()
        kind = self.kind or _kind(known, self.label)
        form = _form(kind)
        if self.label is not None:
            _alike(known, self.label)
        if labels is None:
            labels = _classes(known, self.label, form)
        read = {name: _Checked(split, self, form, tuple(labels)) for name, split in splits.items()}
        measured = read["validation" if "validation" in read else "train"]
        answers = [row[self.label] for _, row in measured.rows if self.label is not None]
        return dataclasses.replace(
            bare_task(kind, labels, self.text),
            chance=form.chance(answers),
            source=", ".join(dict.fromkeys(split.origin for split in splits.values())),
            label=self.label or "",
            read=lambda split: read[split].as_read(),
        )

    def as_json(self, kind: str, digest: str) -> dict[str, Any]:
        """The record in a delta: columns, kind, and a digest of the validation rows. Where files lie is not in it."""
        return {"text": list(self.text), "label": self.label, "kind": kind, "validation": digest}

    def _splits(self) -> tuple[_Split, dict[str, _Split]]:
        """The rows as they are written, in memory: those that tell the kind and the labels, and the splits by name."""
        found: dict[str, _Split] = {}
        for name, place in (("train", self.train), ("validation", self.validation)):
            if place is not None:
                origin, unit, numbered = read_rows(place, name)
                found[name] = _Split(
                    origin, unit, [(n, self.with_columns(row, f"{origin}, {unit} {n}")) for n, row in numbered]
                )
                if not found[name].rows:
                    raise TaskError(f"{origin} has no rows.")
        whole = found.get("train") or found["validation"]
        if self.hold_out is not None:
            keys = [None if self.label is None else row[self.label] for _, row in whole.rows]
            order = nested([key if isinstance(key, str | int) else None for key in keys], "hold-out")
            held = set(order[: max(1, round(self.hold_out * len(order)))])
            if len(held) == len(order):
                raise TaskError(f"{whole.origin} has {len(order)} rows, too few to hold out {self.hold_out:g} of them.")
            for name, inside in (("train", False), ("validation", True)):
                rows = [row for i, row in enumerate(whole.rows) if (i in held) == inside]
                share = f"{'a' if inside else 'all but a'} held-out share of {self.hold_out:g}"
                found[name] = _Split(whole.origin, whole.unit, rows, share)
        return whole, found

    def with_columns(self, row: Row, where: str) -> Row:
        """The row, if it has the columns and a text. Raises TaskError, which names `where`."""
        for name in (*self.text, *((self.label,) if self.label is not None else ())):
            if name not in row:
                there = some([short(key) for key in row], ", ", 10) or "nothing"
                raise TaskError(
                    f"{where} has no column {short(name)}. It has {there}.{did_you_mean(name, map(str, row))}"
                )
        if all(row[name] is None or row[name] == [] or not str(row[name]).strip() for name in self.text):
            raise TaskError(f"{where} is empty: there is no text in {' and '.join(map(short, self.text))}.")
        return row


def bare_task(kind: str, labels: Sequence[str], text: tuple[str, ...]) -> Task:
    """A task of this kind without rows. Raises ConfigError for an unknown kind."""
    form = _form(kind)
    labels = () if form.classes is None else tuple(labels)
    return Task(
        name=OWN, fields=text, kind=KINDS[kind], labels=labels, metric=form.metric,
        metric_name=form.metric_name, chance=0.0, source="", epochs=3, eval_every=100,
    )  # fmt: skip


def unlabelled(task: Task, text: tuple[str, ...], rows: NumberedRows) -> Task:
    """The task with other rows for its splits, of which only the texts count: they need no label.

    `text`: their columns; by default the task's. Raises TaskError for a row without them or without text.
    """
    fields = text or task.fields
    own, blank = OwnRows(None, None, fields, None), _form(task.kind.name).blank(task.labels)
    numbered = [
        (n, {**own.with_columns(row, f"{rows.origin}, {rows.unit} {n}"), task.label: blank}) for n, row in rows.numbered
    ]
    return dataclasses.replace(
        task, fields=fields, prepare=None, generate=None, read=lambda split: (rows.origin, rows.unit, numbered)
    )


def _form(kind: str) -> _Form:
    if kind not in FORMS:
        raise ConfigError(f"Unknown kind '{kind}'. Known: {', '.join(FORMS)}.{did_you_mean(kind, FORMS)}")
    return FORMS[kind]


@dataclass(frozen=True)
class _Split:
    origin: str
    unit: str
    rows: Numbered
    share: str = ""


@dataclass(frozen=True)
class _Checked:
    """A split whose labels are those of its kind: checked once, as the task is made."""

    split: _Split
    own: OwnRows
    form: _Form
    labels: tuple[str, ...]

    @functools.cached_property
    def rows(self) -> Numbered:
        return list(self._checked())

    def _checked(self) -> Iterator[tuple[int, Row]]:
        column = self.own.label
        for number, row in self.split.rows:
            if column is not None:
                where = f"{self.split.origin}, {self.split.unit} {number}"
                try:
                    label = self.form.label(row[column], self.labels)
                except ValueError as error:
                    raise TaskError(f"{where}: the label in {short(column)} {error}.") from error
                row = {**row, column: label}
            yield number, row

    def as_read(self) -> tuple[str, str, Numbered]:
        share = f" ({self.split.share})" if self.split.share else ""
        return f"{self.split.origin}{share}", self.split.unit, self.rows


def _kind(split: _Split, column: str | None) -> str:
    """The kind that the labels of the rows tell."""
    if column is None:
        raise ConfigError(
            "Which kind of task is it? Name the column of the labels (label, command line: --label COLUMN), or a kind "
            f"(--kind): {', '.join(FORMS)}."
        )
    labels = _alike(split, column)
    if isinstance(labels[0], list):
        return "multilabel"
    if isinstance(labels[0], bool):
        return "classification"
    different = len(set(labels))
    if isinstance(labels[0], str) and not _numeric(labels):
        if different > max(FEW, len(labels) // 2):
            raise ConfigError(
                f"{split.origin}: the column {short(column)} has {different:,} different texts in {len(labels):,} "
                f"rows, so they hardly name classes. Say what is to be learned: --kind {', '.join(FORMS)}."
            )
        return "classification"
    whole = all(float(label).is_integer() and "." not in str(label) for label in labels)
    return "classification" if whole and different <= FEW else "regression"


def _alike(split: _Split, column: str) -> list[Any]:
    """The labels of a column. Raises TaskError if they are missing or of several types."""
    labels: list[Any] = []
    first: tuple[int, str] | None = None
    for number, row in split.rows:
        label, where = row[column], f"{split.origin}, {split.unit} {number}"
        kind = _TYPES.get(type(label))
        if label is None or label == "":
            raise TaskError(f"{where}: the label in {short(column)} is missing.")
        if kind is None:
            raise TaskError(
                f"{where}: the label in {short(column)} must be a text, a number or a list, got {short(label)}."
            )
        first = first or (number, kind)
        if kind != first[1]:
            raise TaskError(
                f"{where}: the label in {short(column)} is {kind}, {short(label)}, and in {split.unit} {first[0]} it "
                f"is {first[1]}. A column has labels of one type."
            )
        labels.append(label)
    return labels


_TYPES: Mapping[type, str] = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}


def _numeric(labels: Sequence[str]) -> bool:
    """True if all texts are numbers, as in a csv file, which has no other type."""
    try:
        return all(math.isfinite(float(label)) for label in labels)
    except ValueError:
        return False


def _classes(split: _Split, column: str | None, form: _Form) -> tuple[str, ...]:
    """The class names that occur, sorted: numbers by value, texts by their letters."""
    if form.classes is None or column is None:
        return ()
    found: set[str] = set()
    for number, row in split.rows:
        try:
            found.update(form.classes(row[column]))
        except ValueError as error:
            raise TaskError(f"{split.origin}, {split.unit} {number}: the label in {short(column)} {error}.") from error
    if len(found) < 2:
        only = short(found.pop()) if found else "none"
        raise TaskError(f"{split.origin}: every row has the same label, {only}, so there is nothing to learn.")
    return tuple(sorted(found, key=float) if _numeric(list(found)) else sorted(found))


def _name(value: Any) -> str:
    """The name of a class: a text as it is; a whole number without its point."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int):
        raise ValueError(f"must be the name of a class, a text or a whole number, got {short(value)}")
    if value == "":
        raise ValueError("is missing")
    return str(value)


def _number_of(value: Any, labels: tuple[str, ...]) -> int:
    name = _name(value)
    if name not in labels:
        raise ValueError(
            f"is {short(name)}, which does not occur in training; there it is one of {some(labels, ', ', 20)}"
            f"{did_you_mean(name, labels)}"
        )
    return labels.index(name)


def _score(value: Any, labels: tuple[str, ...]) -> float:
    try:
        score = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"must be a finite number, got {short(value)}")
    return score


def _names(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list of texts, got {short(value)}")
    return [_name(each) for each in value]


def _flags(value: Any, labels: tuple[str, ...]) -> list[int]:
    there = {_number_of(each, labels) for each in _names(value)}
    return [int(i in there) for i in range(len(labels))]


def _most_frequent(labels: Sequence[Any]) -> float:
    return max(Counter(labels).values()) / len(labels)


def _constant_f1(labels: Sequence[Sequence[int]]) -> float:
    """The micro F1 of the best set of labels for all rows, which are the k most frequent for some k."""
    counts = sorted((sum(column) for column in zip(*labels, strict=True)), reverse=True)
    total = sum(counts)
    return max(2 * sum(counts[:k]) / (k * len(labels) + total) for k in range(1, len(counts) + 1))


FORMS: dict[str, _Form] = {
    "classification": _Form(
        accuracy, "accuracy", _number_of, lambda _: 0, _most_frequent, lambda value: [_name(value)]
    ),
    "regression": _Form(pearson_spearman, "mean of Pearson and Spearman", _score, lambda _: 0.0),
    "multilabel": _Form(multilabel_f1, "f1_micro", _flags, lambda labels: [0] * len(labels), _constant_f1, _names),
}
"""The kinds that rows of one's own can have."""
