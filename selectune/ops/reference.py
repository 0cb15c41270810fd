"""Every op in plain torch: the definition that the kernels are tested against.

Letters: t tokens, o outputs, i inputs of a linear layer, k entries of the support.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from selectune.bits import flat_view, scatter_entries, wide
from selectune.ops.scratch import scratch

_CHUNK = 1 << 24  # scalars of a gathered product held at once

_PIECE = 1 << 20  # scalars scored at once
_SUMMED = 1 << 20  # scalars summed at once
_ONE_BY_ONE = 64  # how many entries of a dense product cost as much as one of a sparse product


def checksum(tensor: Tensor, at: Tensor | None = None) -> int:
    """Sum over entries of bits x (2 p + 1 mod 2^32), modulo 2^64; p: the flat position, or that in `at` (k,).

    It changes if any entry changes, or if two entries less than 2^31 apart change places.
    """
    found, total = flat_view(tensor), torch.zeros((), dtype=torch.int64, device=tensor.device)
    mask = -1 if found.element_size() == 8 else (1 << 8 * found.element_size()) - 1
    for first in range(0, found.numel(), _SUMMED):
        part = found[first : first + _SUMMED].long() & mask
        if at is None:
            places = torch.arange(first, first + part.numel(), device=tensor.device)
        else:
            places = at[first : first + _SUMMED].to(tensor.device)
        total += (part * ((2 * places + 1) & 0xFFFFFFFF)).sum()
    return int(total) % (1 << 64)


def sampled_matmul(
    dy: Tensor,  # (t, o)
    x: Tensor,  # (t, i)
    rows: Tensor,  # (k,) int64 into o
    cols: Tensor,  # (k,) int64 into i
) -> Tensor:  # (k,) float32, or float64 for float64 operands
    """The gradient of a linear weight at its support: g_k = sum_t dy[t, rows_k] x[t, cols_k]."""
    out = torch.empty(rows.numel(), dtype=wide(dy.dtype), device=dy.device)
    step = max(1, _CHUNK // max(1, dy.shape[0]))
    for start in range(0, rows.numel(), step):
        part = slice(start, start + step)
        product = dy[:, rows[part]].to(out.dtype) * x[:, cols[part]].to(out.dtype)
        torch.sum(product, 0, out=out[part])
    return out


def sparse_product(
    x: Tensor,  # (t, i)
    rows: Tensor,  # (k,) int64 into the outputs
    cols: Tensor,  # (k,) int64 into i
    values: Tensor,  # (k,); no two are of one row and column
    width: int,  # o
) -> Tensor:  # (t, o) float32, or float64 for float64 x
    """x S^T of a sparse matrix S (o, i): y[t, r] = sum of values_k x[t, cols_k] over the entries k of row r.

    Few entries are added one by one, in their order; many, and any on a GPU, are one dense product.
    """
    x = x.to(wide(x.dtype))
    if x.device.type != "cpu" or rows.numel() * _ONE_BY_ONE > width * x.shape[1]:
        dense = x.new_zeros(width, x.shape[1])
        dense[rows, cols] = values.to(x)
        return x @ dense.mT
    turned, out = x.mT.contiguous(), x.new_zeros(width, x.shape[0])
    step = max(1, _CHUNK // max(1, x.shape[0]))
    for start in range(0, rows.numel(), step):
        part = slice(start, start + step)
        out.index_add_(0, rows[part], turned[cols[part]].mul_(values[part, None].to(x)))
    return out.mT


def score(
    weight: Tensor,  # (n,) float32 or float64
    gradient: Tensor,  # (n,) the same
    exp: float,
    eps: float,
) -> Tensor:  # (n,)
    """|g| / (|w| + eps)^exp, in the order of operations that every kernel follows for exp 0, 1 and 2."""
    if exp == 0.0:
        return gradient.abs()
    size = weight.abs().add_(eps)
    if exp != 1.0:
        size = size.mul_(size) if exp == 2.0 else size.pow_(exp)
    return gradient.abs().div_(size)


def score_filter(
    weight: Tensor,  # (n,) flat
    gradient: Tensor,  # (n,) flat
    exp: float,
    eps: float,
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (m,) int64 ascending, (m,) float32 or float64, () bool
    """The entries whose score is at least `cutoff` and above 0, their scores, and whether all scores are finite.

    Scores are float32, or float64 for a float64 weight, whatever the gradient's dtype.
    """
    dtype = wide(weight.dtype)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    positions, kept = [], []
    for start in range(0, weight.numel(), _PIECE):
        w, g = (part[start : start + _PIECE].to(dtype) for part in (weight, gradient))
        scores = score(w, g, exp, eps)
        finite &= torch.isfinite(scores).all()
        good = ((scores.double() >= cutoff) & (scores > 0)).nonzero().squeeze(1)
        positions.append(good + start)
        kept.append(scores[good])
    if not positions:
        return weight.new_empty(0, dtype=torch.int64), weight.new_empty(0, dtype=dtype), finite
    return torch.cat(positions), torch.cat(kept), finite


def small_filter(
    weight: Tensor,  # (n,) flat
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (m,) int64 ascending, (m,) float32 or float64, () bool
    """The entries whose score -|w| is at least `cutoff`, their scores, and whether all scores are finite."""
    dtype = wide(weight.dtype)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    positions = [weight.new_empty(0, dtype=torch.int64)]
    kept = [weight.new_empty(0, dtype=dtype)]
    for start in range(0, weight.numel(), _PIECE):
        scores = -weight[start : start + _PIECE].to(dtype).abs()
        finite &= torch.isfinite(scores).all()
        good = (scores.double() >= cutoff).nonzero().squeeze(1)
        positions.append(good + start)
        kept.append(scores[good])
    return torch.cat(positions), torch.cat(kept), finite


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest size of a number and the sum of squares of every column of (t, n): (n,), (n,), float32."""
    if x.shape[0] == 0:
        return x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    return x.abs().amax(0), x.double().square().sum(0).float()


def summed(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Entries (m,) of dy^T x, each summed in float64 in the order of the tokens."""
    total = torch.zeros(rows.numel(), dtype=torch.float64)
    for left, right in zip(dy.double(), x.double(), strict=True):
        total += left[rows] * right[cols]
    return total


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x (o, i) in the operands' dtype; on the CPU in memory that the next call reuses."""
    if dy.device.type != "cpu":
        return dy.mT @ x
    return torch.mm(dy.mT, x, out=scratch("weight gradient", (dy.shape[1], x.shape[1]), dy.dtype))


def into_scratch(op: Any, x: Tensor, **options: Any) -> Tensor:
    """An elementwise aten op of x; on the CPU in memory that the next call reuses."""
    if x.device.type != "cpu":
        return op.default(x, **options)
    return op.out(x, **options, out=scratch("elementwise", x.shape, x.dtype))


def product(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x (o, i) in float32 or float64; half operands are widened a few tokens at a time, and no sum is rounded.

    On the CPU the result is in memory that the next call reuses.
    """
    if dy.dtype == wide(dy.dtype):
        return weight_gradient(dy, x)
    if dy.device.type == "cuda":
        return torch.mm(dy.mT, x, out_dtype=torch.float32)
    total = torch.zeros(dy.shape[1], x.shape[1], device=dy.device)
    for first in range(0, dy.shape[0], 256):
        total.addmm_(dy[first : first + 256].float().mT, x[first : first + 256].float())
    return total


def scatter_values(
    weight: Tensor,  # any shape and strides
    flat: Tensor,  # (k,) int64, row-major, unique
    values: Tensor,  # (b,)
    slots: Tensor,  # (k,) int64 into values
) -> None:
    """weight.view(-1)[flat] = values[slots], cast to the weight's dtype, in place."""
    scatter_entries(weight, flat, values.detach()[slots].to(weight.device))


def powers(beta: float, longest: int, dtype: torch.dtype) -> Tensor:
    """beta^0, beta^1, ... until the power is negligible against 1, or until `longest`; not empty."""
    digits = 60 if dtype == torch.float64 else 30
    enough = math.ceil(-digits * math.log(2.0) / math.log(beta)) if 0 < beta < 1 else 1
    return torch.tensor(beta, dtype=torch.float64).pow(torch.arange(min(longest, enough) + 1)).to(dtype)


def adamw_step(
    values: Tensor,  # (n,)
    gradient: Tensor,  # (n,)
    m: Tensor,  # (n,)
    v: Tensor,  # (n,)
    ages: Tensor | None,  # (n,) int32: steps each entry has taken; None = `step` for all
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step (Loshchilov and Hutter, 2019) in place; with `ages`, every entry has its own bias correction.

    With `ages`, an entry of age 0 stays unchanged until its first gradient that is not 0.
    """
    if ages is None:
        values.mul_(1 - lr * weight_decay)
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        bottom = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
        values.addcdiv_(m, bottom, value=-lr / (1 - beta1**step))
        return
    awake = (ages > 0) | (gradient != 0)
    ages.add_(awake)
    first, second = (
        1 - table[ages.long().clamp(max=table.numel() - 1)].to(values)
        for table in (powers(b, step, torch.float64).to(values.device) for b in (beta1, beta2))
    )
    new_m = m.lerp(gradient, 1 - beta1)
    new_v = (v * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    moved = values * (1 - lr * weight_decay) - lr / first * new_m / (new_v.sqrt() / second.sqrt() + eps)
    for old, new in ((values, moved), (m, new_m), (v, new_v)):
        old.copy_(torch.where(awake, new, old))


def sampled_sum(dy: Tensor, cols: Tensor) -> Tensor:
    """The gradient of a bias at its support: g_k = sum_t dy[t, cols_k], summed in float32 or float64."""
    if cols.numel() * 16 > dy.shape[1]:
        return dy.sum(0, dtype=wide(dy.dtype))[cols]
    return dy.index_select(1, cols).sum(0, dtype=wide(dy.dtype))


def sampled_rows(
    dy: Tensor,  # (t, d) gradient of the looked-up rows
    ids: Tensor,  # (t,) int64, the row each token looked up; -1 = none
    rows: Tensor,  # (k,) int64
    cols: Tensor,  # (k,) int64
) -> Tensor:  # (k,)
    """The gradient of an embedding at its support: g_k = sum over t with ids_t = rows_k of dy[t, cols_k]."""
    occurring, block = row_sums(dy, ids)
    if occurring.numel() == 0:
        return torch.zeros(rows.shape, dtype=block.dtype, device=dy.device)
    at = torch.searchsorted(occurring, rows).clamp_(max=occurring.numel() - 1)
    found = occurring[at] == rows
    return torch.where(found, block[at, cols], block.new_zeros(()))


def row_sums(dy: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that occur (u,), ascending, and their summed gradients (u, d). All other rows are zero."""
    occurring, inverse = torch.unique(ids, return_inverse=True)
    block = torch.zeros(occurring.numel(), dy.shape[1], dtype=wide(dy.dtype), device=dy.device)
    block.index_add_(0, inverse, dy.to(block.dtype))
    if occurring.numel() and int(occurring[0]) < 0:
        occurring, block = occurring[1:], block[1:]
    return occurring, block
