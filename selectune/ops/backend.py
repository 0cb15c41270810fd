"""Which implementation runs, and why."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from selectune.ops import cpu

log = logging.getLogger("selectune")

DENSE_ABOVE = 0.02  # density from which the dense product is cheaper than sampling (docs/log.md)


def sampled_matmul(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The gradient of a linear weight at its support, by the cheapest way (see `reference.sampled_matmul`)."""
    entries = dy.shape[1] * x.shape[1]
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if dy.device.type == "cpu" and rows.numel() < DENSE_ABOVE * entries and _numba():
        return cpu.sampled_matmul(dy.detach().to(wide), x.detach().to(wide), rows, cols)
    return (dy.mT @ x).to(wide).view(-1)[rows * x.shape[1] + cols]


def explain() -> str:
    """One sentence on the backend in use."""
    return "numba loops on the CPU" if _numba() else "dense products and torch gathers (numba is not installed)"


@functools.cache
def _numba() -> bool:
    if importlib.util.find_spec("numba") is None:
        log.warning("numba is not installed: sparse gradients on the CPU fall back to dense products.")
        return False
    return True
