"""The metric of a model on a task: one function for training, `eval` and the demo, so that numbers agree to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from selectune import plugins
from selectune.tasks import ANSWER, Features, Task


@dataclass(frozen=True)
class Retention:
    """The loss per token of a held-out text, in nats, without and with what was trained."""

    text: str
    tokens: int
    before: float
    after: float

    @property
    def forgetting(self) -> float:
        """After minus before: above 0 if the model became worse at the text."""
        return self.after - self.before

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "forgetting": self.forgetting}


@dataclass(frozen=True)
class Evaluation:
    """The value of a task's metric over a number of examples, and further metrics by name, if the task has them.

    `retention`: what the model lost on another text, if that was asked for. `delta`: the repository and commit of a
    delta from the hub. `predictions`, `answers`: of every row, in
    the order of the rows, as the metric takes them.
    """

    task: str
    metric: str
    value: float
    examples: int
    others: Mapping[str, float] = field(default_factory=dict)
    retention: Retention | None = None
    delta: str | None = None
    predictions: Sequence[Any] = field(default=(), repr=False, compare=False)
    answers: Sequence[Any] = field(default=(), repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        told = {"task": self.task, "metric": self.metric, "value": self.value, "examples": self.examples}
        told |= {"others": dict(self.others)} if self.others else {}
        told |= {"delta": self.delta} if self.delta else {}
        return told | ({"retention": self.retention.as_json()} if self.retention else {})


def batches(rows: Sequence[Features], size: int) -> list[list[int]]:
    """The numbers of the rows in batches of similar length, which depend on nothing but the rows.

    >>> batches([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}, {"input_ids": [1]}], 2)
    [[2, 0], [1]]
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["input_ids"]), i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Features],
    look: Callable[[], None] | None = None,
) -> Evaluation:
    """The task's metric on encoded rows, in eval mode and without gradients. The model's mode is restored.

    Batches have rows of similar length, in an order that depends only on the rows. `look` is called before each batch
    and may raise to end the measurement.
    """
    predictions: list[Any] = [None] * len(rows)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), plugins.blame(plugins.source_of(plugins.TASKS, task.name)):
            for chosen in batches(rows, task.kind.batch):
                if look is not None:
                    look()
                found = task.kind.predict(task, model, tokenizer, [rows[i] for i in chosen])
                for i, value in zip(chosen, found, strict=True):
                    predictions[i] = value
    finally:
        model.train(training)
    with plugins.blame(plugins.source_of(plugins.TASKS, task.name)):
        answers = [row[ANSWER] for row in rows]
        scores = task.scores(predictions, answers)
    value = scores.pop(task.metric_name)
    return Evaluation(task.name, task.metric_name, value, len(rows), scores, predictions=predictions, answers=answers)
