"""g_k = sum_t dy[t, rows_k] x[t, cols_k] on CUDA."""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from selectune import bits
from selectune.ops.triton.language import accumulator, block, jit, tl, triton


def sampled_matmul(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """`reference.sampled_matmul`: a block of entries per program, tokens in turn.

    Operands are read with tokens innermost, so that a read is a run of memory and not one scalar of
    every line; that turned copy lives for the call.
    """
    out = torch.empty(rows.numel(), dtype=bits.wide(dy.dtype), device=dy.device)
    if rows.numel() == 0:
        return out
    turned_dy, turned_x = dy.mT.contiguous(), x.mT.contiguous()
    entries, tokens = block(16, 8), block(128, 16)
    sampled_matmul_kernel[(triton.cdiv(rows.numel(), entries),)](
        turned_dy, turned_x, rows.contiguous(), cols.contiguous(), out, dy.shape[0], rows.numel(),
        ENTRIES=entries, TOKENS=tokens, SUM=accumulator(dy.dtype),
    )  # fmt: skip
    return out


@jit
def sampled_matmul_kernel(
    dy, x, rows, cols, out, t, k, ENTRIES: tl.constexpr, TOKENS: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < k
    row = tl.load(rows + entry, mask=inside, other=0).to(tl.int64)
    col = tl.load(cols + entry, mask=inside, other=0).to(tl.int64)
    total = tl.zeros((ENTRIES,), dtype=SUM)
    for first in range(0, t, TOKENS):
        token = first + tl.arange(0, TOKENS).to(tl.int64)
        mask = inside[:, None] & (token < t)[None, :]
        a = tl.load(dy + row[:, None] * t + token[None, :], mask=mask, other=0.0).to(SUM)  # (ENTRIES, TOKENS)
        b = tl.load(x + col[:, None] * t + token[None, :], mask=mask, other=0.0).to(SUM)
        total += tl.sum(a * b, axis=1)
    tl.store(out + entry, total, mask=inside)
