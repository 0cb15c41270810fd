"""Soft labels: the probability of each class in place of one class, and the rows that an ensemble is surest of."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectune.errors import ConfigError, TaskError
from selectune.files import write_durably
from selectune.files.reading import short
from selectune.tasks.kinds.classify import Classification, Distilled
from selectune.tasks.kinds.cloze import Cloze
from selectune.tasks.own import OwnRows
from selectune.tasks.sources import read_rows
from selectune.tasks.splits import Split
from selectune.tasks.task import Example, Task

PREDICTION = "prediction"
"""The key of what is predicted, beside the row's own."""

LEAST = 1e-30
"""A smaller probability counts as this one, since a model may round one to 0."""


def soft_labels(probabilities: Tensor, weights: Sequence[float], temperature: float = 2.0) -> Tensor:
    """What an ensemble says of each row: the softmax of its members' weighted mean score, at a temperature.

        q(c | x) = exp(s(c, x) / T) / sum over classes of exp(s / T),    s = sum_m w_m log p_m(c | x) / sum_m w_m

    `probabilities`: of each member, row and class, (members, rows, classes). `weights`: of each member, not negative;
    if all are 0 they count alike. The paper averages the logits of the members, which differ from log p by a constant
    of each row that the softmax takes away. Gives (rows, classes), float64.

    Source: Schick, Schütze 2021 (PET), arXiv 2001.07676, section 3.2: w is a pattern's accuracy before training; T = 2.

    >>> soft_labels(torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]), [1.0, 1.0], temperature=1.0)
    tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """
    share = torch.tensor(weights, dtype=torch.float64)
    share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / len(share))
    scores = probabilities.double().clamp_min(LEAST).log()
    return (torch.einsum("m,mrc->rc", share, scores) / temperature).softmax(-1)


def surest(soft: Tensor, counts: Sequence[int], factor: int) -> list[tuple[int, int]]:
    """The rows that a training set grows by to `factor` times its size, each with its likeliest class.

        new rows of class c: (factor - 1) counts[c], those with the largest q(c | x) among the rows whose class is c

    `soft`: (rows, classes). Classes keep their shares, and of equal rows the first counts. A class has fewer new rows
    if there are not so many. Pairs of row and class, in the order of the rows.

    Source: Schick, Schütze 2021 (iPET), arXiv 2001.07676, section 3.4, which draws rows by chance, the surer the
    likelier; here the surest are taken.

    >>> surest(torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]), [1, 1], factor=2)
    [(1, 0), (2, 1)]
    """
    sureness, classes = soft.max(-1)
    found: list[tuple[int, int]] = []
    for label, count in enumerate(counts):
        rows = sorted((classes == label).nonzero()[:, 0].tolist(), key=lambda row: (-float(sureness[row]), row))
        found += [(row, label) for row in rows[: (factor - 1) * count]]
    return sorted(found)


def with_soft_labels(task: Task) -> Task:
    """A task of classes that learns from the probability of each class too. Raises ConfigError for another kind."""
    if isinstance(task.kind, Cloze):
        return task
    if type(task.kind) is not Classification:
        raise ConfigError(f"Soft labels are for a task of one class of several; {task.name} is a {task.kind.name}.")
    return dataclasses.replace(task, kind=Distilled(**vars(task.kind)))


def read_soft(task: Task, place: str) -> Split:
    """Rows with the probability of each class, as `selectune predict` writes them, in place of a task's own.

    Raises TaskError, which names file and line, for a row without texts, or whose prediction has not a probability for
    each of the task's labels.
    """
    rows, own = read_rows(place, "train"), OwnRows(None, None, task.fields, None)
    examples: list[Example] = []
    for number, row in rows.numbered:
        where = f"{rows.origin}, {rows.unit} {number}"
        texts = tuple(own.with_columns(row, where)[name] for name in task.fields)
        if not all(isinstance(text, str) for text in texts):
            raise TaskError(f"{where}: the texts of {task.name} must be strings, got {short(texts)}.")
        examples.append(Example(texts, _distribution(task, row.get(PREDICTION), where)))
    if not examples:
        raise TaskError(f"{rows.origin} has no rows.")
    return Split(tuple(examples), rows.origin)


def write_soft(task: Task, examples: Sequence[Example], place: Path) -> None:
    """Writes rows as `read_soft` reads them; an example whose label is a class has probability 1 for it."""
    lines = []
    for texts, label in examples:
        row = label if isinstance(label, list) else [float(i == label) for i in range(len(task.labels))]
        told = {**dict(zip(task.fields, texts, strict=True)), PREDICTION: Classification().answer(task, row)}
        lines.append(json.dumps(told, ensure_ascii=False).encode() + b"\n")
    write_durably(place, b"".join(lines))


def counts_of(task: Task, examples: Sequence[Example]) -> list[int]:
    """The number of examples of each class."""
    found = Counter(example.label for example in examples)
    return [found[label] for label in range(len(task.labels))]


def _distribution(task: Task, told: Any, where: str) -> list[float]:
    given = told.get("probabilities") if isinstance(told, Mapping) else None
    if not isinstance(given, Mapping) or set(given) != set(task.labels):
        raise TaskError(
            f"{where}: '{PREDICTION}' must have 'probabilities' of the labels of {task.name}, "
            f"{', '.join(task.labels)}, as `selectune predict` writes them. Got {short(told)}."
        )
    row = [given[name] for name in task.labels]
    right = all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in row)
    if not right or not math.isclose(sum(row), 1, abs_tol=1e-3):
        raise TaskError(f"{where}: probabilities must be from 0 to 1 and add up to 1. Got {short(given)}.")
    return [float(p) for p in row]
