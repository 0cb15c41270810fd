"""The data of a calibrated score in a run: single examples, mini-batches or ones, and the loss of each."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectune.errors import CalibrationError
from selectune.types import Reads, Score

Rows = Sequence[dict[str, Any]]


def calibration(
    model: nn.Module,
    score: Score | None,
    rows: Rows,
    collate: Callable[[Rows], dict[str, Tensor]],
    batch: int,
    seed: int,
    own: Callable[..., Tensor] | None = None,
) -> dict[str, Any]:
    """The arguments `calibration` and `loss` of `attach` for this score; empty if the score needs none.

    `own`: the loss of the task's kind, from the model's outputs and the labels; None for the model's loss. The order of
    the rows is drawn from the seed and is the same at each reading. Raises CalibrationError if the score needs more
    examples or mini-batches than the rows give.
    """
    if score is None or not score.reads.calibrated:
        return {}
    if score.reads is Reads.FLOW:
        return {"calibration": lambda: [_ones(model, rows)], "loss": _outputs}
    size = 1 if score.reads is Reads.EXAMPLES else batch
    unit = "examples" if score.reads is Reads.EXAMPLES else "batches"
    wanted, there = score.parameters.get(unit), -(-len(rows) // size)
    if wanted is not None and wanted > there:
        option = "pool" if score.parameters.get("hardest") is not None else unit
        what = "single examples" if unit == "examples" else f"mini-batches of {size}"
        raise CalibrationError(
            f"The method reads {wanted} {what}, the training set has {there}. Lower its option, "
            f"as in --method name:{option}={there}."
        )

    def batches() -> Iterator[dict[str, Tensor]]:
        where = next(model.parameters()).device
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        for start in range(0, len(order), size):
            made = collate([rows[i] for i in order[start : start + size]])
            yield {key: value.to(where) for key, value in made.items()}

    if score.parameters.get("labels") == "model":
        if _several(model):
            raise CalibrationError(
                'labels="model" weights one class of several by its probability, and rows of this task have any number '
                'of labels. Use labels="data".'
            )
        return {"calibration": batches, "loss": _logits}
    return {"calibration": batches, "loss": loss_of if own is None else functools.partial(_own_loss, own)}


def loss_of(model: nn.Module, batch: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """The model's own loss; with a temperature, the loss of the logits divided by it."""
    if temperature == 1.0:
        return model(**batch).loss
    logits, labels = _logits(model, batch) / temperature, batch["labels"]
    if logits.ndim != 2:
        raise CalibrationError(
            f"A temperature needs logits of shape (batch, classes), and this model gives {tuple(logits.shape)}. "
            "With temperature=1 the model's own loss is used."
        )
    if _several(model):
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits))
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.to(logits))
    return F.cross_entropy(logits, labels)


def _several(model: Any) -> bool:
    """Whether a row has any number of labels."""
    return getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"


def _own_loss(
    own: Callable[..., Tensor], model: nn.Module, batch: Mapping[str, Tensor], temperature: float = 1.0
) -> Tensor:
    if temperature != 1.0:
        raise CalibrationError(f"temperature={temperature:g}: only for a model's own loss; this task has its own.")
    return own(model(**{key: value for key, value in batch.items() if key != "labels"}), batch["labels"])


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def _ones(model: Any, rows: Rows) -> Tensor:
    """Ones in place of input embeddings, (1, tokens, width), with as many tokens as the first row has."""
    table = model.get_input_embeddings().weight
    return torch.ones(1, len(rows[0]["input_ids"]), table.shape[1], dtype=table.dtype, device=table.device)


def _outputs(model: Any, ones: Tensor) -> Tensor:
    inputs = {"inputs_embeds": ones}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_inputs_embeds"] = ones
    return model(**inputs).logits.sum()
