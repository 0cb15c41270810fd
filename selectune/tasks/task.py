"""A task as a value: where its rows come from, its kind, its metric and the papers' settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from selectune.errors import TaskError

Row = Mapping[str, Any]
Features = dict[str, Any]
"""One encoded row: what the model reads, not padded, and under ANSWER what its prediction is compared with."""

ANSWER = "answer"
Metric = Callable[[Sequence[Any], Sequence[Any]], float | Mapping[str, float]]
"""(predictions, answers) -> one number, or several by name."""


class Example(NamedTuple):
    """One row: its texts, and what is to be learned from it (a class, a score, tags, a text)."""

    texts: tuple[str, ...]
    label: Any


@dataclass(frozen=True)
class Head:
    """A class of transformers and its head: the number of outputs, and the settings of the config that go with it."""

    architecture: str  # a model's class, or AutoModelFor...
    num_labels: int | None = None
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    pad_token_id: int | None = None


class TaskKind(Protocol):
    """What is done with a task's rows: the model's head, and the ways to encode, collate and predict.

    Kinds are values: one kind serves many tasks. `batch`: rows that are predicted at once. The number is fixed, because
    other batches have other padding and give other last bits.

    A kind may have `loss(outputs, labels, num_items_in_batch)`, which takes the place of the model's own loss, as
    `compute_loss_func` of the Trainer does.
    """

    @property
    def name(self) -> str: ...

    @property
    def batch(self) -> int: ...

    def head(self, task: Task) -> Head:
        """The class of transformers and the head that the task needs."""
        ...

    def example(self, task: Task, row: Row, where: str) -> Example:
        """A row, checked. Raises TaskError, which names `where`."""
        ...

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        """The token numbers of each example, cut to `max_length` (the log counts it) and not padded, and its answer."""
        ...

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        """A batch to train on, padded to its longest row, with `labels`."""
        ...

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        """A prediction for each row. The model is in eval mode and gradients are off."""
        ...


@dataclass(frozen=True)
class Hub:
    """A task's place on the Hugging Face hub; `revision` is a commit, so that rows never change. None: the newest."""

    path: str
    config: str | None
    revision: str | None


@dataclass(frozen=True)
class Task:
    """A benchmark: its rows, its kind, its metric, its chance level and its source.

    `folders`: places below a data folder, tried in order. `fields`: the texts of a row, and `label`: what is learned
    from it. `prepare` makes a row with these from a row as it is published. `chance`: the score of the best constant
    answer on the validation split, if there is one. `metric_name` is the metric's name, or the one that counts if it
    gives several. `epochs`, `eval_every` (steps) and `max_length` (tokens) are the papers' settings. `generate(split)`
    replaces files and hub, and so do the training rows of `parts`, other tasks, and `read(split)`, which gives the
    origin of rows, what their numbers count, and the numbered rows. `arrange(examples, split)`: the examples of "train"
    or "validation", made of those that were read.

    >>> import selectune.tasks as tasks
    >>> tasks.get("glue/rte").labels
    ('entailment', 'not_entailment')
    """

    name: str
    fields: tuple[str, ...]
    kind: TaskKind
    labels: tuple[str, ...]  # class names by number; empty for a kind without classes
    metric: Metric
    metric_name: str
    chance: float | None
    source: str
    epochs: int
    eval_every: int
    max_length: int = 256
    hub: Hub | None = None
    folders: tuple[str, ...] = ()
    train: str = "train"
    validation: str = "validation"
    label: str = "label"
    prepare: Callable[[Row], Row] | None = None
    generate: Callable[[str], Sequence[Row]] | None = None
    read: Callable[[str], tuple[str, str, Iterable[tuple[int, Row]]]] | None = None
    parts: tuple[Task, ...] = ()
    arrange: Callable[[Sequence[Example], str], Sequence[Example]] | None = None
    lower_is_better: bool = False

    @property
    def head(self) -> Head:
        """The class of transformers and the head that a model needs for it."""
        return self.kind.head(self)

    def fits(self, model: Any) -> None:
        """Raises TaskError for a model that could not answer a row, if the kind has a check: `fits(task, model)`."""
        check = getattr(self.kind, "fits", None)
        if check is not None:
            check(self, model)

    def encode(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        """The examples as the model reads them; see `TaskKind.encode`."""
        return self.kind.encode(self, tokenizer, examples, max_length)

    def scores(self, predictions: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
        """The metric of some predictions by name, the one that counts first. Refuses lists of different or no length.

        >>> import selectune.tasks as tasks
        >>> tasks.get("glue/rte").scores([0, 1], [0, 0])
        {'accuracy': 0.5}
        """
        if len(predictions) != len(answers) or not len(answers):
            raise TaskError(
                f"The metric of {self.name} needs as many predictions as labels and at least one; "
                f"got {len(predictions)} and {len(answers)}."
            )
        found = self.metric(predictions, answers)
        if not isinstance(found, Mapping):
            return {self.metric_name: float(found)}
        if self.metric_name not in found:
            raise TaskError(
                f"The metric of {self.name} gave {', '.join(found) or 'nothing'}, and not '{self.metric_name}', which "
                "the task names as the one that counts."
            )
        return {name: float(found[name]) for name in dict.fromkeys((self.metric_name, *found))}


def missing_in(task: Task, row: Row, where: str) -> None:
    """Raises TaskError if a field or the label is missing in a row."""
    missing = [name for name in (*task.fields, task.label) if name not in row]
    if missing:
        raise TaskError(
            f"{where}: a row of {task.name} needs {', '.join((*task.fields, task.label))}; "
            f"missing: {', '.join(missing)}. Got {', '.join(map(str, row)) or 'nothing'}."
        )


def texts_of(task: Task, row: Row, where: str) -> tuple[str, ...]:
    """The texts of a row. Raises TaskError if a field or the label is missing, or a text is no string."""
    missing_in(task, row, where)
    texts = tuple(row[name] for name in task.fields)
    if not all(isinstance(text, str) for text in texts):
        raise TaskError(f"{where}: the texts of {task.name} must be strings, got {texts!r:.120}.")
    return texts


def padded(tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
    """What the tokenizer made of each row, as one batch that is padded to its longest row."""
    names = [name for name in tokenizer.model_input_names if name in rows[0]]
    texts = [{name: row[name] for name in names} for row in rows]
    return dict(tokenizer.pad(texts, padding=True, return_tensors="pt"))


def token_batch(tokenizer: Any, rows: Sequence[Sequence[int]], left: bool = False) -> dict[str, Tensor]:
    """Tokens as one batch, padded without the tokenizer, which may prefer the other side."""
    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # masked, so any number will do
    mask = [[1] * len(row) for row in rows]
    return {"input_ids": filled(rows, padding, left), "attention_mask": filled(mask, 0, left)}


def filled(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Rows of numbers as one tensor, int64, filled up with `value` at their ends or, with `left`, at their starts.

    >>> filled([[1, 2], [3]], 0, left=True).tolist()
    [[1, 2], [0, 3]]
    """
    width = max(map(len, rows))
    gaps = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)])


def to_model(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the model's device, without its labels."""
    where = next(model.parameters()).device
    return {name: tensor.to(where) for name, tensor in batch.items() if name != "labels"}


def numbers(values: Sequence[int] | Sequence[float]) -> Tensor:
    """Labels as a tensor: float32 for scores and int64 for classes."""
    return torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else torch.int64)
