"""What a kind needs to be learned from anybody's rows: a metric, the labels as rows have them, a constant answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from selectune.errors import ConfigError, TaskError, did_you_mean
from selectune.files.reading import short, some
from selectune.tasks.metrics import (
    accuracy,
    choice_accuracy,
    entity_f1,
    exact_match,
    multilabel_f1,
    pearson_spearman,
    perplexity,
    rouge,
    tag_accuracy,
)
from selectune.tasks.metrics.entities import entities
from selectune.tasks.task import Metric


class Form(NamedTuple):
    """What a kind needs beside `TaskKind`. `label` and `classes` raise ValueError, which says what is wanted."""

    metric: Metric
    metric_name: str
    label: Callable[[Any, tuple[str, ...]], Any] | None = None
    """A row's label as the kind takes it, from the label as it is written and the class names; None: as it is."""
    blank: Callable[[int, Any], Any] | None = None
    """What stands in for the label of a row that has none, from the number of classes and the row's first text."""
    chance: Callable[[Sequence[Any]], float] | None = None
    """The score of the best constant answer to these labels, if there is one."""
    classes: Callable[[Any], Sequence[str]] | None = None
    """The class names in a row's label, if the kind has classes."""
    lower_is_better: bool = False


def form_of(kind: str, labels: Sequence[str] = ()) -> Form:
    """The form of a kind. Raises ConfigError for an unknown one.

    `labels`: the class names. Tags that name no entity, such as parts of speech, are measured by their accuracy.

    >>> form_of("tagging", ("B-PER", "O")).metric_name, form_of("tagging", ("NOUN", "O")).metric_name
    ('f1', 'accuracy')
    """
    if kind == "cloze":  # its rows are those of classes
        kind = "classification"
    if kind not in FORMS:
        raise ConfigError(f"Unknown kind '{kind}'. Known: {', '.join(FORMS)}.{did_you_mean(kind, FORMS)}")
    form = FORMS[kind]
    if form.metric is entity_f1 and not _name_entities(labels):
        return form._replace(metric=tag_accuracy, metric_name="accuracy", chance=_most_frequent_tag)
    return form


def _name_entities(tags: Sequence[str]) -> bool:
    try:
        return bool(entities(tags))
    except TaskError:
        return False


def numeric(labels: Sequence[str]) -> bool:
    """True if all texts are finite numbers, written without the "_" that Python allows in them.

    >>> numeric(["1", "2.5e3"]), numeric(["2024_01"])
    (True, False)
    """
    try:
        return all("_" not in label and math.isfinite(float(label)) for label in labels)
    except ValueError:
        return False


LONGEST_NAME = 4096
"""Characters of a class name, of which a delta keeps no more (`delta.file.model_info`)."""


def class_name(value: Any) -> str:
    """The name of a class: a text as it is, a whole number without its point. Raises ValueError for anything else.

    >>> class_name("yes"), class_name(3), class_name(3.0), class_name(True)
    ('yes', '3', '3', 'true')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int):
        raise ValueError(f"must be the name of a class, a text or a whole number, got {short(value)}")
    if value == "":
        raise ValueError("is missing")
    if not str(value).isprintable() or len(str(value)) > LONGEST_NAME:
        raise ValueError(
            f"must have at most {LONGEST_NAME:,} characters, all printable, because a delta keeps the names; got "
            f"{short(value)}"
        )
    return str(value)


def _number(value: Any, labels: tuple[str, ...]) -> int:
    name = class_name(value)
    if name not in labels:
        raise ValueError(
            f"is {short(name)}, which does not occur in training; there it is one of {some(labels, ', ', 20)}"
            f"{did_you_mean(name, labels)}"
        )
    return labels.index(name)


def _score(value: Any, labels: tuple[str, ...]) -> float:
    number = numeric([value]) if isinstance(value, str) else isinstance(value, int | float)
    try:
        score = float(value) if number and not isinstance(value, bool) else math.nan
    except OverflowError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"must be a finite number, got {short(value)}")
    return score


def _choice(value: Any, labels: tuple[str, ...]) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value  # of a csv file


def _names(value: Any) -> list[str]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of texts, got {short(value)}")
    return [class_name(each) for each in value]


def _flags(value: Any, labels: tuple[str, ...]) -> list[int]:
    there = {_number(each, labels) for each in _names(value)}
    return [int(i in there) for i in range(len(labels))]


def _tags(value: Any, labels: tuple[str, ...]) -> list[str]:
    return [labels[_number(each, labels)] for each in _names(value)]


def _most_frequent(labels: Sequence[Any]) -> float:
    return max(Counter(labels).values()) / len(labels)


def _most_frequent_tag(labels: Sequence[Sequence[str]]) -> float:
    return _most_frequent([tag for row in labels for tag in row])


def _constant_f1(labels: Sequence[Sequence[int]]) -> float:
    """The micro F1 of the best set of labels for all rows, which are the k most frequent for some k."""
    counts = sorted((sum(column) for column in zip(*labels, strict=True)), reverse=True)
    total = sum(counts)
    return max(2 * sum(counts[:k]) / (k * len(labels) + total) for k in range(1, len(counts) + 1))


def _nothing(labels: Sequence[Any]) -> float:
    return 0.0


def _some_text(classes: int, text: Any) -> str:
    return "-"


FORMS: dict[str, Form] = {
    "classification": Form(
        accuracy, "accuracy", _number, lambda classes, text: 0, _most_frequent, lambda value: [class_name(value)]
    ),
    "regression": Form(
        pearson_spearman, "mean of Pearson and Spearman", _score, lambda classes, text: 0.0, _nothing
    ),
    "multilabel": Form(multilabel_f1, "f1_micro", _flags, lambda classes, text: [0] * classes, _constant_f1, _names),
    "tagging": Form(entity_f1, "f1", _tags, lambda classes, text: [0] * len(text), _nothing, _names),
    "completion": Form(exact_match, "exact match", blank=_some_text),
    "completion-loss": Form(perplexity, "perplexity", lower_is_better=True),
    "seq2seq": Form(rouge, "rougeL", blank=_some_text),
    "choice": Form(choice_accuracy, "accuracy", _choice, lambda classes, text: 0),
    "language": Form(perplexity, "perplexity", lower_is_better=True),
}  # fmt: skip
"""The kinds that rows of one's own can have."""
