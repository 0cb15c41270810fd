"""Which optimizer a run trains with: the one that its recipe's row names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import selectune as st

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, weight_decay: float) -> torch.optim.Optimizer | None:
    """None: the Trainer's own AdamW, where all tensors have one learning rate."""
    return torch.optim.AdamW(groups, weight_decay=weight_decay) if len(groups) > 1 else None


def _entry(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return st.SparseAdamW(groups, weight_decay=weight_decay, age="entry")


def _sm3(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return st.SparseSM3(groups, weight_decay=weight_decay)


# names as in selectune.recipes.Recipe.optimizer
OPTIMIZERS: Mapping[str, Callable[[Groups, float], torch.optim.Optimizer | None]] = {
    "adamw": _adamw,
    "adamw-entry": _entry,
    "sm3": _sm3,
}
