"""Entries of a gradient dy^T x whose score may reach a cutoff on CUDA, found without writing the gradient to memory.

A tile of entries is skipped if the norms of its rows and columns, and then its weights, leave it no chance. The cutoff
is read from the device's memory, so the host need not know it.
"""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from selectune.ops.bounds import SAFE
from selectune.ops.triton.language import block, interpreted, jit, tl, triton
from selectune.ops.triton.score_filter import KINDS


def product_filter(
    dy: Tensor,  # (t, o) float32, bfloat16 or float16
    x: Tensor,  # (t, i) the same
    weight: Tensor,  # (o, i)
    exp: float,
    eps: float,
    cutoff: Tensor,  # () float32 on the device, above 0
    room: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (room,) int64, (room,) float32, () int64
    """Entries with |g| / (|w| + eps)^exp >= cutoff for g = dy^T x, and some just below it: positions, g, their number.

    |g| is taken larger by what a sum in float32 may be wrong by, so no entry is missed. Entries come in no order. If
    there are more than `room`, or an operand is not finite, the number is above `room`: take the dense product then.
    """
    (t, o), i = dy.shape, x.shape[1]
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    wrong = (t + 8) * 2.0**-23  # of a sum in float32, in any order, rounded to nearest or cut
    grown = 1 + t * 2.0**-23  # what rounding can take from a norm
    left, right = ((part.float().square().sum(0).sqrt() * grown + t**0.5 * 1e-19) for part in (dy, x))
    least = 1 - SAFE * (1 + abs(exp))
    real = torch.tensor([exp, eps, wrong / (1 - wrong), least, eps**exp if exp >= 0 else 0.0]).to(weight.device)
    positions = torch.zeros(room, dtype=torch.int64, device=weight.device)
    gradients = torch.zeros(room, dtype=torch.float32, device=weight.device)
    count = torch.where(torch.isfinite(left.sum() + right.sum()), 0, room + 1)
    rows, columns, tokens = block(64, 16), block(64, 16), block(32, 16)
    if t and weight.numel():
        product_filter_kernel[(triton.cdiv(o, rows), triton.cdiv(i, columns))](
            dy, x, weight, left, right, real, cutoff, positions, gradients, count, t, o, i, room,
            KIND=KINDS.get(exp, 3), ROWS=rows, COLUMNS=columns, TOKENS=tokens, WIDEN=interpreted(),
        )  # fmt: skip
    return positions, gradients, count


@jit
def power_of(size, exp, KIND: tl.constexpr):
    """size^exp."""
    if KIND == 0:
        return size * 0.0 + 1.0
    if KIND == 1:
        return size
    if KIND == 2:
        return size * size
    return tl.exp2(exp * tl.log2(size))


@jit
def product_filter_kernel(
    dy, x, weight, left, right, real, cutoff, positions, gradients, count, t, o, i, room,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    exp, eps = tl.load(real), tl.load(real + 1)
    least = tl.load(cutoff) * tl.load(real + 3)
    near = tl.load(left + row, mask=row < o, other=0.0)
    far = tl.load(right + column, mask=column < i, other=0.0)
    inside = (row < o)[:, None] & (column < i)[None, :]
    entry = row[:, None] * i + column[None, :]
    most = tl.max(near, axis=0) * tl.max(far, axis=0)
    if (most < least * tl.load(real + 4)) == 0:  # by the largest factor of any weight
        size = tl.abs(tl.load(weight + entry, mask=inside, other=0.0).to(tl.float32)) + eps
        asked = tl.where(inside, least * power_of(size, exp, KIND), float("inf"))  # of |g|
        bound = near[:, None] * far[None, :]
        if tl.sum(((bound < asked) == 0).to(tl.int32)) > 0:
            total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for first in range(0, t, TOKENS):
                token = first + tl.arange(0, TOKENS).to(tl.int64)
                a = tl.load(dy + token[None, :] * o + row[:, None], mask=(token < t)[None, :] & (row < o)[:, None],
                            other=0.0)  # fmt: skip
                b = tl.load(x + token[:, None] * i + column[None, :], mask=(token < t)[:, None] & (column < i)[None, :],
                            other=0.0)  # fmt: skip
                if WIDEN:  # the interpreter multiplies the bits of bfloat16
                    a, b = a.to(tl.float32), b.to(tl.float32)
                total = tl.dot(a, b, total, input_precision="ieee")
            good = tl.ravel(inside & ((tl.abs(total) + tl.load(real + 2) * bound < asked) == 0))
            first = tl.atomic_add(count, tl.sum(good.to(tl.int64), axis=0))
            place = first + tl.cumsum(good.to(tl.int64), axis=0) - 1
            fits = good & (place < room)
            tl.store(positions + place, tl.ravel(entry), mask=fits)
            tl.store(gradients + place, tl.ravel(total), mask=fits)
