"""The metric of a model on a task: one function for training, `eval` and the demo, so that numbers agree to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selectune import plugins
from selectune.tasks import Example, Task

BATCH = 32
"""Rows in a batch. The number is fixed, because other batches have other padding and give other last bits."""


@dataclass(frozen=True)
class Evaluation:
    """The value of a task's metric over a number of examples."""

    task: str
    metric: str
    value: float
    examples: int

    def as_json(self) -> dict[str, Any]:
        return {"task": self.task, "metric": self.metric, "value": self.value, "examples": self.examples}


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[dict[str, Any]]:
    """The token numbers and the label of each example, cut to `max_length` and not padded."""
    columns = zip(*(example.texts for example in examples), strict=True)
    encoded = tokenizer(*(list(column) for column in columns), truncation=True, max_length=max_length, padding=False)
    return [
        {**{key: encoded[key][i] for key in encoded}, "labels": example.label} for i, example in enumerate(examples)
    ]


def collate(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, padded to its longest row; labels are float for a regression and int64 for classes."""
    texts = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
    batch = dict(tokenizer.pad(texts, padding=True, return_tensors="pt"))
    labels = [row["labels"] for row in rows]
    batch["labels"] = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)
    return batch


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[dict[str, Any]],
    look: Callable[[], None] | None = None,
) -> Evaluation:
    """The task's metric on encoded rows, in eval mode and without gradients. The model's mode is restored.

    Batches have rows of similar length, in an order that depends only on the rows. `look` is called before each batch
    and may raise to end the measurement.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["input_ids"]), i))
    predictions: list[float] = [0.0] * len(rows)
    where = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), BATCH):
                if look is not None:
                    look()
                chosen = order[start : start + BATCH]
                batch = collate(tokenizer, [rows[i] for i in chosen])
                del batch["labels"]
                logits = model(**{key: value.to(where) for key, value in batch.items()}).logits.float().cpu()
                found = logits[:, 0] if task.kind == "regression" else logits.argmax(-1)
                for i, value in zip(chosen, found.tolist(), strict=True):
                    predictions[i] = value
    finally:
        model.train(training)
    with plugins.blame(plugins.source_of(plugins.TASKS, task.name)):
        value = task.score(predictions, [row["labels"] for row in rows])
    return Evaluation(task.name, task.metric_name, value, len(rows))
