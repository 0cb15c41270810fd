"""CPU kernels, compiled by numba at first use and cached on disk where that is allowed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sampled_matmul(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """`reference.sampled_matmul` for float32 and float64: a loop over tokens for every block of entries."""
    out = torch.zeros(rows.numel(), dtype=dy.dtype)
    _kernel()(
        dy.contiguous().numpy(),
        x.contiguous().numpy(),
        rows.numpy(),
        cols.numpy(),
        out.numpy(),
        torch.get_num_threads(),
    )
    return out


@functools.cache
def _kernel() -> Callable[..., Any]:
    numba = importlib.import_module("numba")  # 0.5 s to import, so only when it is needed

    @numba.njit(parallel=True, fastmath={"contract", "reassoc"}, cache=True, nogil=True)
    def gather(dy, x, rows, cols, out, blocks):  # type: ignore[no-untyped-def]
        per = (rows.size + blocks - 1) // blocks
        for b in numba.prange(blocks):
            first, last = b * per, min(rows.size, (b + 1) * per)
            for t in range(dy.shape[0]):
                for k in range(first, last):
                    out[k] += dy[t, rows[k]] * x[t, cols[k]]

    return gather
