"""Tasks of one or two texts: a class of several, a score, or any number of labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selectune.errors import TaskError
from selectune.tasks.task import (
    ANSWER,
    Example,
    Features,
    Head,
    Row,
    Task,
    numbers,
    padded,
    texts_of,
    to_model,
)

log = logging.getLogger("selectune")

MAX_LABEL = 1e15
"""Largest score of a regression, whose square still fits a float32."""


@dataclass(frozen=True)
class Classification:
    """One of the task's `labels` for one or two texts, by AutoModelForSequenceClassification.

    Labels are numbers 0 to n - 1, and so are predictions.

    >>> from selectune import tasks
    >>> tasks.get("glue/rte").kind.name
    'classification'
    """

    name: str = "classification"
    batch: int = 32

    def head(self, task: Task) -> Head:
        return _head(len(task.labels), task.labels, "single_label_classification")

    def example(self, task: Task, row: Row, where: str) -> Example:
        texts, label = texts_of(task, row, where), _number(task, row, where)
        if label not in range(len(task.labels)):  # 1.0 is 1: a table with gaps holds integers as floats
            raise TaskError(
                f"{where}: the label of {task.name} must be 0 to {len(task.labels) - 1} "
                f"({', '.join(task.labels)}), got {label!r:.80}."
            )
        return Example(texts, int(label))

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        columns = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length, padding=False)
        if (cut := sum(bool(each.overflowing) for each in encoded.encodings or ())) > 0:  # fast tokenizers tell
            log.warning(
                "%d of %d rows of %s were cut to max_length=%d tokens.", cut, len(examples), task.name, max_length
            )
        return [{**{key: encoded[key][i] for key in encoded}, ANSWER: e.label} for i, e in enumerate(examples)]

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        return {**padded(tokenizer, rows), "labels": numbers([row[ANSWER] for row in rows])}

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        return self.predicted(model(**to_model(model, padded(tokenizer, rows))).logits.float().cpu())

    def predicted(self, logits: Tensor) -> list[Any]:
        """The predictions of a batch: logits (rows, outputs) float32 -> a class or a score for each row."""
        return logits.argmax(-1).tolist()

    def answers(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        """For each row the name of its class and the probability of every class, for `selectune predict`."""
        logits = model(**to_model(model, padded(tokenizer, rows))).logits.float().cpu()
        return [self.answer(task, row) for row in self.probabilities(logits).tolist()]

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def answer(self, task: Task, row: Sequence[float]) -> Any:
        return {"label": task.labels[row.index(max(row))], "probabilities": dict(zip(task.labels, row, strict=True))}


@dataclass(frozen=True)
class Distilled(Classification):
    """A class of several that is learned from the probability of each: the cross-entropy with q in place of a class.

    An answer is a number, as in `Classification`, or a list of probabilities.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531.
    """

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        return {**padded(tokenizer, rows), "labels": targets([row[ANSWER] for row in rows])}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """-sum q log p, the mean over the rows of the step if the numbers in all its labels are told."""
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch / (labels.numel() / len(labels))
        return F.cross_entropy(outputs.logits.float(), labels, reduction="sum") / rows


@dataclass(frozen=True)
class Regression(Classification):
    """A score for one or two texts, by a head with one output and the squared error as its loss."""

    name: str = "regression"

    def head(self, task: Task) -> Head:
        return _head(1, None, "regression")

    def example(self, task: Task, row: Row, where: str) -> Example:
        texts, label = texts_of(task, row, where), _number(task, row, where)
        if abs(label) > MAX_LABEL:
            raise TaskError(f"{where}: the label of {task.name} must be at most {MAX_LABEL:g}, got {label!r:.80}.")
        return Example(texts, float(label))

    def predicted(self, logits: Tensor) -> list[Any]:
        return logits[:, 0].tolist()

    def answers(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        return self.predict(task, model, tokenizer, rows)


@dataclass(frozen=True)
class Multilabel(Classification):
    """Any number of the task's `labels` for one or two texts; each label has a binary cross-entropy of its own.

    Labels and predictions have a 0 or 1 for each of the task's labels. A label is predicted where its probability is
    above one half.

    >>> Multilabel().name
    'multilabel'
    """

    name: str = "multilabel"

    def head(self, task: Task) -> Head:
        return _head(len(task.labels), task.labels, "multi_label_classification")

    def example(self, task: Task, row: Row, where: str) -> Example:
        texts, label = texts_of(task, row, where), row[task.label]
        if not isinstance(label, list) or len(label) != len(task.labels) or any(value not in (0, 1) for value in label):
            raise TaskError(
                f"{where}: the label of {task.name} must be a 0 or 1 for each of {len(task.labels)} labels, "
                f"got {label!r:.80}."
            )
        return Example(texts, [int(value) for value in label])

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        return {**padded(tokenizer, rows), "labels": torch.tensor([row[ANSWER] for row in rows], dtype=torch.float32)}

    def predicted(self, logits: Tensor) -> list[Any]:
        return (logits > 0).long().tolist()

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def answer(self, task: Task, row: Sequence[float]) -> Any:
        probabilities = dict(zip(task.labels, row, strict=True))
        return {"labels": [name for name, p in probabilities.items() if p > 0.5], "probabilities": probabilities}


def targets(answers: Sequence[Any]) -> Tensor:
    """Answers of which each is a class or a list of probabilities, as cross_entropy takes them.

    >>> targets([1, 0]), targets([[0.5, 0.5]])
    (tensor([1, 0]), tensor([[0.5000, 0.5000]]))
    """
    return torch.tensor(answers, dtype=torch.float32 if isinstance(answers[0], list) else torch.int64)


def _head(outputs: int, labels: tuple[str, ...] | None, problem_type: str) -> Head:
    return Head("AutoModelForSequenceClassification", outputs, labels, problem_type)


def _number(task: Task, row: Row, where: str) -> int | float:
    label = row[task.label]
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise TaskError(f"{where}: the label of {task.name} must be a number, got {label!r:.80}.")
    if isinstance(label, float) and not math.isfinite(label):  # the metric of a whole run would fail on it
        raise TaskError(f"{where}: the label of {task.name} must be finite, got {label!r}.")
    return label
