"""The weight gradient, scored in registers: only candidates are written, never the gradient."""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from selectune.ops import reference
from selectune.ops.triton.language import accumulator, block, interpreted, jit, tl, triton
from selectune.ops.triton.score_filter import KINDS, score_of

Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # positions, scores, gradients (room,), count, finite


def matmul_score_filter(
    dy: Tensor, x: Tensor, weight: Tensor, exp: float, eps: float, cutoff: float, room: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.matmul_score_filter`; more candidates than `room` take the reference's way."""
    n = weight.numel()
    room = min(n, max(1 << 14, n // 64)) if room is None else room
    positions, scores, gradients, count, finite = candidates(dy, x, weight, exp, eps, cutoff, room)
    found = int(count)
    if found > room:
        return reference.matmul_score_filter(dy, x, weight, exp, eps, cutoff)
    order = torch.argsort(positions[:found])
    return positions[:found][order], scores[:found][order], gradients[:found][order], finite


def candidates(dy: Tensor, x: Tensor, weight: Tensor, exp: float, eps: float, cutoff: float, room: int) -> Found:
    """Up to `room` candidates in no order, and how many there are: nothing is waited for.

    A count above `room` means that some are missing; what was found is then to be thrown away.
    """
    weight = weight.contiguous()
    real = torch.tensor([exp, eps, cutoff], dtype=torch.float64).to(dy.device)
    state = torch.zeros(2, dtype=torch.int64, device=dy.device)
    positions = torch.empty(room, dtype=torch.int64, device=dy.device)
    scores = torch.empty(room, dtype=reference.wide(weight.dtype), device=dy.device)
    gradients = torch.empty(room, dtype=reference.wide(dy.dtype), device=dy.device)
    (t, o), i = dy.shape, x.shape[1]
    sizes = {"ROWS": block(128, 16), "COLS": block(128, 16), "TOKENS": block(32, 16)}
    if dy.dtype == torch.float64:
        sizes = {"ROWS": 16, "COLS": 16, "TOKENS": 16}
    if weight.numel():
        matmul_score_filter_kernel[(triton.cdiv(o, sizes["ROWS"]), triton.cdiv(i, sizes["COLS"]))](
            dy, x, weight, real, positions, scores, gradients, state, t, o, i, *dy.stride(), *x.stride(), room,
            KIND=KINDS.get(exp, 3), SUM=accumulator(dy.dtype), SCORE=accumulator(weight.dtype),
            PLAIN=dy.dtype == torch.float64, WIDEN=interpreted(), EXACT=not interpreted(), **sizes,
        )  # fmt: skip
    return positions, scores, gradients, state[0], state[1] == 0


@jit
def matmul_score_filter_kernel(
    dy, x, weight, real, positions, scores, gradients, state, t, o, i, dy_t, dy_o, x_t, x_i, room,
    KIND: tl.constexpr, SUM: tl.constexpr, SCORE: tl.constexpr, PLAIN: tl.constexpr, WIDEN: tl.constexpr,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    g = tl.zeros((ROWS, COLS), dtype=SUM)
    for first in range(0, t, TOKENS):
        token = first + tl.arange(0, TOKENS).to(tl.int64)
        a_mask = (row < o)[:, None] & (token < t)[None, :]
        b_mask = (token < t)[:, None] & (col < i)[None, :]
        a = tl.load(dy + row[:, None] * dy_o + token[None, :] * dy_t, mask=a_mask, other=0.0)  # (ROWS, TOKENS)
        b = tl.load(x + token[:, None] * x_t + col[None, :] * x_i, mask=b_mask, other=0.0)  # (TOKENS, COLS)
        if WIDEN:  # the interpreter multiplies bfloat16 as if it were integers
            a, b = a.to(SUM), b.to(SUM)
        if PLAIN:  # float64: no matrix unit is asked for
            g += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
        else:
            g = tl.dot(a, b, g, input_precision="ieee")
    entry = tl.reshape(row[:, None] * i + col[None, :], (ROWS * COLS,))
    inside = tl.reshape((row < o)[:, None] & (col < i)[None, :], (ROWS * COLS,))
    w = tl.load(weight + entry, mask=inside, other=0.0).to(SCORE)
    flat = tl.reshape(g, (ROWS * COLS,))
    score = score_of(w, flat.to(SCORE), tl.load(real).to(SCORE), tl.load(real + 1).to(SCORE), KIND, SCORE, EXACT)
    broken = inside & (score - score != 0.0)
    good = inside & (score.to(tl.float64) >= tl.load(real + 2)) & (score > 0.0)
    start = tl.atomic_add(state, tl.sum(good.to(tl.int64), axis=0))
    if tl.sum(broken.to(tl.int64), axis=0) > 0:
        tl.store(state + 1, 1)
    place = start + tl.cumsum(good.to(tl.int64), axis=0) - 1
    fits = good & (place < room)
    tl.store(positions + place, entry, mask=fits)
    tl.store(scores + place, score, mask=fits)
    tl.store(gradients + place, flat, mask=fits)
