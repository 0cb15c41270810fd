"""A task of the user's own: files of rows and the names of their columns, without code."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectune.errors import ConfigError, TaskError, did_you_mean
from selectune.files.reading import short, some
from selectune.tasks.kinds import KINDS
from selectune.tasks.labels import FORMS, Form, form_of, numeric
from selectune.tasks.sources import NumberedRows, all_texts, read_rows
from selectune.tasks.splits import nested
from selectune.tasks.task import Row, Task

OWN = "own"
"""The name of such a task; a delta that was trained on one records it."""

FEW = 20
"""The most different integers that are taken for classes; beyond it they are scores."""

LITTLE = 20
"""A held-out share of fewer rows is measured with a warning."""

log = logging.getLogger("selectune")
Numbered = Sequence[tuple[int, Row]]


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
        if self.label in self.text:
            raise ConfigError(
                f"The column {short(self.label)} is named as a text and as the label; they are different."
            )
        known, splits = self._splits()
        kind = self.kind or _kind(known, self.label, self.text)
        form = form_of(kind)
        if self.label is None and kind != "language":
            raise ConfigError(f"label is missing: the column of what a {kind} learns (command line: --label COLUMN).")
        if self.label is not None and form.label is not None:
            _alike(known, self.label)
        if labels is None:
            labels = _classes(known, self.label, form)
        form = form_of(kind, labels)
        read = {name: _Checked(split, self, form, tuple(labels)) for name, split in splits.items()}
        measured = read["validation" if "validation" in read else "train"]
        answers = [row[self.label] for _, row in measured.rows if self.label is not None]
        return dataclasses.replace(
            bare_task(kind, labels, self.text),
            chance=None if form.chance is None else form.chance(answers),
            source=", ".join(dict.fromkeys(split.origin for split in splits.values())),
            label=self.label or self.text[0],
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
            if len(held) < LITTLE:
                log.warning(
                    "hold_out=%g of %s is %d rows, of which a metric says little.",
                    self.hold_out, whole.origin, len(held),
                )  # fmt: skip
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
    """A task of this kind without rows. Raises ConfigError for an unknown kind, or columns that it does not take."""
    form = form_of(kind, labels)
    if kind not in KINDS:
        raise ConfigError(
            f"A {kind} is made of a pattern and words, which `train` takes (command line: --pattern, --words) "
            "and a delta records; the kind of its rows is classification."
        )
    least, most, what = _COLUMNS.get(kind, (1, len(text), ""))
    if not least <= len(text) <= most:
        raise ConfigError(f"A {kind} takes {what}, and {len(text)} columns are named: {', '.join(text) or 'none'}.")
    labels = () if form.classes is None else tuple(labels)
    return Task(
        name=OWN, fields=text, kind=KINDS[kind], labels=labels, metric=form.metric,
        metric_name=form.metric_name, chance=None, source="", epochs=3, eval_every=100,
        lower_is_better=form.lower_is_better,
    )  # fmt: skip


def unlabelled(task: Task, text: tuple[str, ...], rows: NumberedRows) -> Task:
    """The task with other rows for its splits, of which only the texts count: they need no label.

    `text`: their columns; by default the task's. Raises TaskError for a row without them or without text.
    """
    fields, blank = text or task.fields, form_of(task.kind.name).blank
    if blank is None:
        raise ConfigError(
            f"Rows of {task.name} have no prediction of their own: its kind, {task.kind.name}, is measured only."
        )
    own = OwnRows(None, None, fields, None)
    numbered = []
    for number, row in rows.numbered:
        whole = own.with_columns(row, f"{rows.origin}, {rows.unit} {number}")
        numbered.append((number, {**whole, "": blank(len(task.labels), whole[fields[0]])}))
    return dataclasses.replace(
        task, fields=fields, label="", prepare=None, generate=None, parts=(), arrange=None,
        read=lambda split: (rows.origin, rows.unit, numbered),
    )  # fmt: skip


_COLUMNS = {  # how many columns of text a kind takes; any number for the others
    **dict.fromkeys(("classification", "regression", "multilabel"), (1, 2, "one text or two (--text a,b)")),
    "tagging": (1, 1, "one column of words (--text words)"),
    "choice": (2, 2, "a prompt and a list of choices (--text prompt,choices)"),
}


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
    form: Form
    labels: tuple[str, ...]

    @functools.cached_property
    def rows(self) -> Numbered:
        return list(self._checked())

    def _checked(self) -> Iterator[tuple[int, Row]]:
        column = self.own.label
        for number, row in self.split.rows:
            if column is not None and self.form.label is not None:
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


def _kind(split: _Split, column: str | None, texts: tuple[str, ...]) -> str:
    """The kind that the labels of the rows tell."""
    if column is None:
        raise ConfigError(
            "Which kind of task is it? Name the column of the labels (label, command line: --label COLUMN), or a kind "
            f"(--kind): {', '.join(FORMS)}."
        )
    labels = _alike(split, column)
    if isinstance(labels[0], list):
        return "tagging" if isinstance(split.rows[0][1][texts[0]], list) else "multilabel"
    if isinstance(labels[0], bool):
        return "classification"
    different = len(set(labels))
    if isinstance(labels[0], str) and not (all_texts(split.origin) and numeric(labels)):
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


def _classes(split: _Split, column: str | None, form: Form) -> tuple[str, ...]:
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
    alike: dict[str, list[str]] = {}
    for name in sorted(found):
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    if twins := [names for names in alike.values() if len(names) > 1]:
        log.warning(
            "%s: %s differ in blanks or in the case of letters only, and are taken for different classes.",
            split.origin,
            "; ".join(" and ".join(map(short, names)) for names in twins[:5]),
        )
    if numeric(list(found)):  # numbers that are equal as floats are ordered by how they are written
        return tuple(sorted(found, key=lambda name: (float(name), name)))
    return tuple(sorted(found))
