"""Scanning: a tensor's scores, piece by piece, into a collector.

Exact and streaming: at most one dense gradient and one piece of scores are alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from selectune import ops
from selectune.scope import ScopedTensor
from selectune.types import Collector, Score

PIECE = 1 << 20  # scalars scored at once: small enough for the caches, large enough to be cheap

NOT_ELIGIBLE = float("-inf")

SAME_BITS = (0.0, 1.0, 2.0)  # exponents whose fused scores have the bits of the score's own function


def scan(
    collector: Collector,
    score: Score,
    tensor: ScopedTensor,
    taken: Tensor | None,  # (n,) int64 ascending: flat indices that may not be chosen
    gradient: Tensor | None = None,  # the weight's shape, or (r, d) for given rows
    rows: Tensor | None = None,  # (r,) ascending
    generator: torch.Generator | None = None,
    ready: Tensor | None = None,  # scores known beforehand, the weight's shape
) -> bool:
    """Scores one tensor and offers it; False if a score is NaN or infinite (then it is not offered whole)."""
    weight = tensor.parameter.detach()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    barred = _barred(tensor, taken, rows)
    cutoff = getattr(collector, "cutoff", NOT_ELIGIBLE)
    fused = score.fused and score.parameters["exp"] in SAME_BITS
    if fused and gradient is not None and ready is None and cutoff > NOT_ELIGIBLE:
        return _scan_fused(collector, score, tensor, barred, gradient, rows, cutoff)
    for start, w, g, known in _pieces(weight, gradient, rows, ready):
        g = None if g is None else g.to(wide)
        scores = score(w.to(wide), g, generator) if known is None else known
        if not _finite(scores):
            return False
        if score.above is not None:
            scores = scores.masked_fill(scores <= score.above, NOT_ELIGIBLE)
        mine = barred[torch.searchsorted(barred, start) : torch.searchsorted(barred, start + w.numel())]
        if mine.numel():
            scores = scores.index_fill(0, mine - start, NOT_ELIGIBLE)
        if rows is None:
            collector.offer(tensor.index, start, scores, g)
        else:
            flat = torch.arange(start, start + w.numel(), device=w.device)
            width = weight.shape[-1]
            collector.offer(tensor.index, rows[flat // width] * width + flat % width, scores, g)
    return True


def _scan_fused(
    collector: Collector,
    score: Score,
    tensor: ScopedTensor,
    barred: Tensor,
    gradient: Tensor,
    rows: Tensor | None,
    cutoff: float,
) -> bool:
    """One pass over weight and gradient; only entries that reach the cutoff are written down at all."""
    weight = tensor.parameter.detach()
    w = (weight if rows is None else weight[rows]).reshape(-1)
    g = gradient.detach().reshape(-1)
    at, scores, finite = ops.score_filter(w, g, score.parameters["exp"], score.parameters["eps"], cutoff)
    if not bool(finite):
        return False
    if barred.numel() and at.numel():
        nearest = torch.searchsorted(barred, at).clamp_(max=barred.numel() - 1)
        free = barred[nearest] != at
        at, scores = at[free], scores[free]
    width = weight.shape[-1] if rows is not None else 1
    flat = at if rows is None else rows[at // width] * width + at % width
    collector.offer(tensor.index, flat, scores, g[at])
    return True


def _pieces(
    weight: Tensor, gradient: Tensor | None, rows: Tensor | None, ready: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor | None]]:
    """(first position, weights, gradients, known scores), all flat, of every piece."""
    w = (weight if rows is None else weight[rows]).reshape(-1)
    g = None if gradient is None else gradient.detach().reshape(-1)
    known = None if ready is None else ready.reshape(-1)
    for start in range(0, w.numel(), PIECE):
        part = slice(start, start + PIECE)
        yield start, w[part], None if g is None else g[part], None if known is None else known[part]


def _barred(tensor: ScopedTensor, taken: Tensor | None, rows: Tensor | None) -> Tensor:
    """Positions that may not be chosen, ascending: in the tensor, or in the block of rows."""
    device = tensor.parameter.device
    parts = [torch.arange(tensor.padding.start, tensor.padding.stop, device=device)]
    if taken is not None:
        parts.append(taken)
    barred = parts[0] if taken is None else torch.sort(torch.cat(parts)).values
    if rows is None or barred.numel() == 0 or rows.numel() == 0:
        return barred if rows is None else barred[:0]
    width = tensor.parameter.shape[-1]
    at = torch.searchsorted(rows, barred // width).clamp_(max=rows.numel() - 1)
    here = rows[at] == barred // width
    return at[here] * width + barred[here] % width


def _finite(scores: Tensor) -> bool:
    return bool(torch.isfinite(scores.sum())) or bool(torch.isfinite(scores).all())
