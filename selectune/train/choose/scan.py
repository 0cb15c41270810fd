"""Offers a tensor's scores to a collector, piece by piece.

Exact and streaming: at most one dense gradient and one piece of scores exist at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selectune import bits, ops
from selectune.errors import ConfigError
from selectune.method import Method
from selectune.ops.bounds import SAFE
from selectune.scope import ScopedTensor
from selectune.types import Collector, Queueing, Reads, Score

log = logging.getLogger("selectune")

SMALL = 1 << 12  # scalars that are scored faster by plain operations than by a compiled loop
PIECE = 1 << 20  # entries scored at once: few enough for the caches, enough to be cheap
QUEUED_PIECE = 1 << 22  # on a GPU: a few launches per piece, 12 bytes of temporary memory per entry

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
    known: Tensor | None = None,  # calibrated scores, the weight's shape
) -> bool:
    """Scores one tensor and offers the scores; False, with only some of them offered, if one is NaN or infinite.

    A score that `ops` can filter takes one pass as soon as the collector has a cutoff. The pieces double as the
    cutoff improves, so that each has about as many candidates as the quota.
    """
    unread = known is not None or score.reads is Reads.NOTHING
    weight = _shaped_like(tensor) if unread else tensor.weight
    w, g, known = _flat(weight, rows), _flat(gradient), _flat(known)
    barred = barred_entries(tensor, taken, rows)
    filtered = known is None and w.numel() > SMALL and has_one_pass(score)
    start, size = 0, max(1, PIECE // 4) if filtered else PIECE
    if filtered and _cutoff(collector) > NOT_ELIGIBLE:
        size = max(1, w.numel())
    while start < w.numel():
        part = slice(start, start + size)
        piece = w[part], None if g is None else g[part]
        mine = barred[torch.searchsorted(barred, start) : torch.searchsorted(barred, start + size)] - start
        cutoff = _cutoff(collector)
        if filtered and cutoff > NOT_ELIGIBLE:
            scored = _in_one_pass(score, *piece, mine, cutoff)
            size *= 2
        else:
            scored = _one_by_one(score, *piece, mine, None if known is None else known[part], generator)
        if scored is None:
            return False
        at, scores, carry = scored
        if rows is None:
            collector.offer(tensor.index, start if at is None else at + start, scores, carry)
        else:
            at = torch.arange(start, start + scores.numel(), device=w.device) if at is None else at + start
            width = weight.shape[-1]
            collector.offer(tensor.index, rows[at // width] * width + at % width, scores, carry)
        start = part.stop
    return True


def _shaped_like(tensor: ScopedTensor) -> Tensor:
    """Zeros in the weight's shape that take no memory: to read a quantised or a sharded weight makes all of it."""
    form = tensor.form
    return torch.zeros((), dtype=form.dtype, device=form.device).expand(form.shape)


def queues(tensor: ScopedTensor, collector: Collector) -> bool:
    """Whether the tensor is on a GPU and the collector can take its scores without making the host wait."""
    return tensor.form.device.type == "cuda" and isinstance(collector, Queueing)


def scan_queued(
    collector: Queueing,
    score: Score,
    tensor: ScopedTensor,
    taken: Tensor | None,
    gradient: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """As `scan` with a gradient, but the host does not wait: whether all scores are finite, bool (), is read later."""
    weight = tensor.weight
    w, g = _flat(weight, rows), _flat(gradient)
    barred, width = barred_entries(tensor, taken, None), weight.shape[-1] if weight.ndim else 1
    wide = bits.wide(w.dtype)
    finite = torch.ones((), dtype=torch.bool, device=w.device)
    if rows is not None:  # the place of each row in the block; one past its end if it is not there
        at = w.new_full((weight.shape[0],), rows.numel(), dtype=torch.int64)
        at[rows] = torch.arange(rows.numel(), device=w.device)
        barred = at[barred // width] * width + barred % width
    for start in range(0, w.numel(), QUEUED_PIECE):
        piece, gradients = w[start : start + QUEUED_PIECE].to(wide), g[start : start + QUEUED_PIECE].to(wide)
        scores = score(piece, gradients, None)
        size = scores.numel()
        finite &= torch.isfinite(scores).all()
        local = barred - start
        not_free = torch.zeros(size + 1, dtype=torch.bool, device=w.device)  # the last one is for all other pieces
        not_free[torch.where((local >= 0) & (local < size), local, size)] = True
        if score.above is not None:
            not_free[:size] |= scores <= score.above
        flat: Tensor | int = start
        if rows is not None:
            local = torch.arange(start, start + size, device=w.device)
            flat = rows[local // width] * width + local % width
        collector.queue(tensor.index, flat, scores.masked_fill(not_free[:size], NOT_ELIGIBLE), gradients)
    return finite


_Scored = tuple[Tensor | None, Tensor, Tensor | None]  # positions in the piece (None: all), scores, gradients


def _one_by_one(
    score: Score, w: Tensor, g: Tensor | None, barred: Tensor, known: Tensor | None, generator: torch.Generator | None
) -> _Scored | None:
    """Every score of a piece; None if one is not finite."""
    wide = bits.wide(w.dtype)
    g = None if g is None else g.to(wide)
    scores = score(w.to(wide), g, generator) if known is None else known
    if not _finite(scores):
        return None
    if score.above is not None:
        scores = scores.masked_fill(scores <= score.above, NOT_ELIGIBLE)
    if barred.numel():
        scores = scores.index_fill(0, barred, NOT_ELIGIBLE)
    return None, scores, g


def _in_one_pass(score: Score, w: Tensor, g: Tensor | None, barred: Tensor, cutoff: float) -> _Scored | None:
    """Only the scores of a piece that reach the cutoff; None if any score is not finite."""
    if g is None:
        at, scores, finite = ops.small_filter(w, cutoff)
    else:
        at, scores, finite = ops.score_filter(w, g, score.parameters["exp"], score.parameters["eps"], cutoff)
    if not bool(finite):
        return None
    if barred.numel() and at.numel():
        nearest = torch.searchsorted(barred, at).clamp_(max=barred.numel() - 1)
        free = barred[nearest] != at
        at, scores = at[free], scores[free]
    return at, scores, None if g is None else g[at]


def has_one_pass(score: Score) -> bool:
    """Whether `ops` scores and filters in one pass, with the bits of the score's own function."""
    return score.fused == "small" or (score.fused == "ratio" and score.parameters["exp"] in SAME_BITS)


def reaching(
    score: Score,
    weight: Tensor,  # (n,)
    gradient: Tensor,  # (n,)
    cutoff: float,
    safe: float,  # what a score may be wrong by
    wrong: float = 0.0,  # what a gradient may be wrong by
) -> Tensor | None:  # (m,) int64 ascending
    """Entries whose score may reach the cutoff; None if a score is not finite."""
    if has_one_pass(score) and safe < cutoff / 2:
        exp, eps = score.parameters["exp"], score.parameters["eps"]
        flat, _, finite = ops.score_filter(weight, gradient, exp, eps, cutoff - safe)
        return flat if bool(finite) else None
    wide, found = bits.wide(weight.dtype), []
    for start in range(0, weight.numel(), PIECE):
        part = slice(start, start + PIECE)
        scores = score(weight[part].to(wide), gradient[part].to(wide).abs() + wrong)
        if not _finite(scores):
            return None
        found.append((scores >= cutoff * (1 - SAFE)).nonzero().squeeze(1) + start)
    return torch.cat(found)


def _cutoff(collector: Collector) -> float:
    return getattr(collector, "cutoff", NOT_ELIGIBLE)


def check_score(score: Score, tensors: Sequence[ScopedTensor]) -> None:
    """Raises ConfigError if a score breaks its contract, or its (|w| + eps)^exp leaves the range of floats."""
    alone = score.reads in (Reads.WEIGHT, Reads.MATRIX, Reads.NOTHING)
    weight, gradient = torch.linspace(-1.0, 1.0, 64), None if alone else torch.linspace(0.5, 1.5, 64)
    weight = weight.view(8, 8) if score.reads is Reads.MATRIX else weight
    score(weight, gradient, torch.Generator().manual_seed(0))  # a trial on numbers of no model
    if score.weighting is not None:
        _check_weighting(score)
    if score.fused != "ratio" or abs(score.parameters["exp"]) <= 8:
        return
    exp, eps = float(score.parameters["exp"]), float(score.parameters["eps"])
    for tensor in tensors:
        weight = tensor.weight
        if not weight.numel():
            continue
        info = torch.finfo(bits.wide(weight.dtype))
        ends = [float(weight.abs().min()) + eps, float(weight.abs().max()) + eps]
        logs = [exp * math.log(end) if end > 0 else -math.copysign(math.inf, exp) for end in ends]
        if max(logs) >= math.log(info.max) or min(logs) <= math.log(info.tiny):
            raise ConfigError(
                f"The score '{score.name}' divides by (|w| + eps)^exp, which with exp={exp:g} and eps={eps:g} leaves "
                f'the range of {info.dtype} for weights of "{tensor.name}" ({ends[0]:.3g} to {ends[1]:.3g} with '
                "eps), so scores would be 0 or infinite. Take an exp nearer to 0 (the paper's is 2), or a larger eps."
            )


def _check_weighting(score: Score) -> None:
    """Raises ConfigError unless |g| times the score's weighting is what its function gives."""
    sizes, gradient = torch.logspace(-4, 2, 64).double(), torch.linspace(-2.0, 2.0, 64).double()
    factor, wanted = score.weigh(sizes), score(sizes, gradient)
    steps = torch.diff(factor)
    monotone = bool((steps >= 0).all() | (steps <= 0).all())
    if monotone and torch.allclose(gradient.abs() * factor, wanted, rtol=1e-6, atol=0.0):
        return
    raise ConfigError(
        f"The score '{score.name}' declares weighting= such that its score is |g| weighting(|w|), "
        + (
            "and its function gives other numbers."
            if monotone
            else "and this factor neither rises nor falls throughout."
        )
        + " Change one of the two, or leave out weighting=, which only makes selecting steps cheaper."
    )


def warn_of_zeros(method: Method, tensors: Sequence[ScopedTensor], budget: int) -> None:
    """Warns if more zeros than the budget tie for the best score, as in LoRA's B matrices: order alone decides then."""
    score = method.score
    if score is None or score.reads is not Reads.WEIGHT or getattr(method.select, "tie", "") != "order":
        return
    zero_wins = bool(torch.diff(score(torch.tensor([0.0, 1.0]))) < 0)
    weights = (tensor.weight.reshape(-1) for tensor in tensors if zero_wins)
    zeros = sum(ops.small_filter(w, 0.0)[0].numel() for w in weights if _has_zeros(w))
    if zeros > budget:
        log.warning(
            "At least %d scalars in scope are exactly 0, more than the budget of %d: the first of them in the model's "
            "order are selected. tie='random' spreads them.", zeros, budget,
        )  # fmt: skip


def _has_zeros(weight: Tensor) -> bool:
    """Whether a sample of about 1024 entries of a flat weight has a zero."""
    step = max(1, weight.numel() // 1024)
    sample = weight[step // 2 :: step]  # not the first entries: a padding row may be zero
    return int(sample.count_nonzero()) < sample.numel()


def _flat(tensor: Tensor | None, rows: Tensor | None = None) -> Any:
    if tensor is None:
        return None
    return (tensor.detach() if rows is None else tensor.detach()[rows]).reshape(-1)


def barred_entries(tensor: ScopedTensor, taken: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """Positions that may not be chosen, ascending: in the tensor, or in the block of rows."""
    parts = [torch.arange(tensor.padding.start, tensor.padding.stop, device=tensor.form.device)]
    if taken is not None:
        parts.append(taken)
    barred = parts[0] if taken is None else torch.sort(torch.cat(parts)).values
    if rows is None or barred.numel() == 0 or rows.numel() == 0:
        return barred if rows is None else barred[:0]
    width = tensor.form.shape[-1]
    at = torch.searchsorted(rows, barred // width).clamp_(max=rows.numel() - 1)
    known = rows[at] == barred // width
    return at[known] * width + barred[known] % width


def _finite(scores: Tensor) -> bool:
    return bool(torch.isfinite(scores.sum())) or bool(torch.isfinite(scores).all())
