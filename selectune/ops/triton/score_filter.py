"""Entries whose score reaches the cutoff on CUDA, in one pass over weight and gradient."""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from selectune import bits
from selectune.ops.triton.language import accumulator, block, interpreted, jit, tl, triton

KINDS = {0.0: 0, 1.0: 1, 2.0: 2}


def score_filter(
    weight: Tensor, gradient: Tensor, exp: float, eps: float, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.score_filter`: one counter gives every candidate a place; the result is sorted afterwards.

    The counter is read once, to size the answer; a call that finds more than its buffer holds is
    repeated with one that is large enough.
    """
    weight, gradient = weight.contiguous(), gradient.contiguous()
    n, wide = weight.numel(), bits.wide(weight.dtype)
    room = min(n, max(1 << 14, n // 64)) if cutoff > 0 else n
    real = torch.tensor([exp, eps, cutoff], dtype=torch.float64).to(weight.device)
    size = block(1024, 128)
    while True:
        state = torch.zeros(2, dtype=torch.int64, device=weight.device)  # the count; whether a score is not finite
        positions = torch.empty(room, dtype=torch.int64, device=weight.device)
        scores = torch.empty(room, dtype=wide, device=weight.device)
        if n:
            score_filter_kernel[(triton.cdiv(n, size),)](
                weight, gradient, real, positions, scores, state, n, room,
                KIND=KINDS.get(exp, 3), SIZE=size, SUM=accumulator(weight.dtype), EXACT=not interpreted(),
            )  # fmt: skip
        found = int(state[0])
        if found <= room:
            break
        room = found
    order = torch.argsort(positions[:found])
    return positions[:found][order], scores[:found][order], state[1] == 0


@jit
def score_of(w, g, exp, eps, KIND: tl.constexpr, SUM: tl.constexpr, EXACT: tl.constexpr):
    """|g| / (|w| + eps)^exp with IEEE division; the interpreter's own division is IEEE already."""
    top = tl.abs(g)
    bottom = tl.abs(w) + eps
    if KIND == 0:
        return top
    if KIND == 2:
        bottom = bottom * bottom
    if KIND == 3:
        bottom = tl.exp2(exp * tl.log2(bottom))
    if EXACT and SUM == tl.float32:
        return tl.div_rn(top, bottom)
    return top / bottom


@jit
def score_filter_kernel(
    weight, gradient, real, positions, scores, state, n, room,
    KIND: tl.constexpr, SIZE: tl.constexpr, SUM: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = entry < n
    w = tl.load(weight + entry, mask=inside, other=0.0).to(SUM)
    g = tl.load(gradient + entry, mask=inside, other=0.0).to(SUM)
    score = score_of(w, g, tl.load(real).to(SUM), tl.load(real + 1).to(SUM), KIND, SUM, EXACT)
    broken = inside & (score - score != 0.0)
    good = inside & (score.to(tl.float64) >= tl.load(real + 2)) & (score > 0.0)
    count = tl.sum(good.to(tl.int64), axis=0)
    first = tl.atomic_add(state, count)
    if tl.sum(broken.to(tl.int64), axis=0) > 0:
        tl.store(state + 1, 1)
    place = first + tl.cumsum(good.to(tl.int64), axis=0) - 1
    fits = good & (place < room)
    tl.store(positions + place, entry, mask=fits)
    tl.store(scores + place, score, mask=fits)
