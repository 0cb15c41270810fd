"""`Tuner.check` on the first rows of a run, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from selectune.train import Tuner, same_chance

log = logging.getLogger("selectune")

ROWS = 2
AFFORDABLE = 4_000_000_000  # weights x tokens of these rows; three passes take about a second on a processor core


def check_first_rows(tuner: Tuner, trainer: Any, loader: Any, wanted: bool | None) -> None:
    """Checks the tuner on the first rows of a Trainer's data; `wanted=None`: only if that takes about a second.

    By default the check needs the Trainer's own loss, because another loss may count its calls, and whole weights. Data
    without rows by number is not checked. The run continues with the same random numbers. Raises IntegrityError as
    `Tuner.check` does.
    """
    own_loss = type(trainer).compute_loss is Trainer.compute_loss
    data: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    rows = min(ROWS, len(data)) if hasattr(data, "__getitem__") and hasattr(data, "__len__") else 0
    if wanted is False or (wanted is None and (not own_loss or tuner.sharded)) or collate is None or rows == 0:
        return
    with same_chance():
        batch = trainer._prepare_inputs(collate([data[row] for row in range(rows)]))
    cost = sum(p.numel() for p in tuner.model.parameters()) * _tokens(batch)
    if wanted is None and cost > AFFORDABLE:
        log.info(
            "The first rows are not checked: %d weights x tokens are above %d (check=True does).", cost, AFFORDABLE
        )
        return

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, dict(batch) if isinstance(batch, Mapping) else batch)

    found = tuner.check(batch, loss)
    log.info("Checked on %d rows: %d tensors have the gradients of plain autograd.", rows, found.tensors)


def _tokens(batch: Any) -> int:
    parts = batch.values() if isinstance(batch, Mapping) else [batch]
    return max((p.shape[0] * p.shape[1] for p in parts if isinstance(p, Tensor) and p.ndim > 1), default=ROWS)
