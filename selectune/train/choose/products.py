"""A linear weight's gradient, given as its factors dy^T x: the entries that score enough, each by one canonical score.

For a quota of a few thousand entries almost no entry of a tensor is selected. Bounds dismiss nearly all of them without
the gradient in float32 (`ops.bounds`); where they do not pay, the dense product does. Either way the candidates that
are left get their gradients as sums in float64 in the order of the tokens. So what is selected depends on the factors
and the weights alone: on no library of products, thread, instruction set or way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selectune import ops
from selectune.ops.bounds import Factors, above
from selectune.scope import ScopedTensor
from selectune.select import GlobalCollector
from selectune.train.choose.scan import SAME_BITS, barred_entries, scan
from selectune.types import Score

CANONICAL = 4096  # the largest quota whose candidates get canonical scores


def canonical(collector: GlobalCollector, score: Score, tensor: ScopedTensor, dy: Tensor, x: Tensor) -> bool:
    """Whether a tensor's candidates get canonical scores: by what is asked for and the dtypes, never by the numbers."""
    weight = tensor.parameter.detach()
    return (
        0 < collector.quota <= min(CANONICAL, weight.numel())
        and score.fused == "ratio"
        and score.parameters["exp"] in SAME_BITS
        and (score.parameters["eps"] > 0 or score.parameters["exp"] == 0)
        and dy.dtype == x.dtype == weight.dtype == torch.float32
        and dy.device.type == weight.device.type == "cpu"
    )


def scan_product(
    collector: GlobalCollector, score: Score, tensor: ScopedTensor, taken: Tensor | None, factors: Factors
) -> tuple[bool, Tensor | None]:
    """Offers one tensor: whether it could, and its dense gradient if that was formed."""
    weight, not_free, whole = tensor.parameter.detach(), barred_entries(tensor, taken), None
    exp, eps = score.parameters["exp"], score.parameters["eps"]
    collector.tighten()
    flat = above(factors, weight, exp, eps, collector.cutoff)
    if flat is None:
        whole = ops.weight_gradient(factors.dy, factors.x)
        flat = _among(whole, collector, score, tensor, taken, factors)
        if flat is None:
            return False, whole
    flat = flat[~torch.isin(flat, not_free)]
    gradient = factors.exact(flat)
    scores = score(weight.reshape(-1)[flat], gradient)
    if not bool(torch.isfinite(scores).all()):
        return False, whole
    if score.above is not None:
        good = scores > score.above
        flat, scores, gradient = flat[good], scores[good], gradient[good]
    collector.offer(tensor.index, flat, scores, gradient)
    return True, whole


def _among(
    whole: Tensor,
    collector: GlobalCollector,
    score: Score,
    tensor: ScopedTensor,
    taken: Tensor | None,
    factors: Factors,
) -> Tensor | None:
    """Candidates by the dense gradient, of which no sum is exact; None if a score or a norm is not finite."""
    weight, (exp, eps) = tensor.parameter.detach(), (score.parameters["exp"], score.parameters["eps"])
    cutoff, wrong = collector.cutoff, factors.rounding()
    if not math.isfinite(wrong * factors.largest()):
        return None
    if cutoff == float("-inf"):  # nothing is known yet: the best of this tensor, by what the sums are
        own = GlobalCollector(collector.quota, [0] * tensor.index + [weight.numel()], None)
        if not scan(own, score, tensor, taken, whole):
            return None
        own.tighten()
        cutoff = own.cutoff
    far = max(0.0, cutoff - 2 * wrong * factors.largest() / eps**exp)
    flat, scores, finite = ops.score_filter(weight.reshape(-1), whole.reshape(-1), exp, eps, far)
    if not bool(finite):
        return None
    rows, columns = flat // weight.shape[1], flat % weight.shape[1]
    bottom = (weight.reshape(-1)[flat].abs() + eps) ** exp
    off = 2 * wrong * factors.left.norm[rows] * factors.right.norm[columns] / bottom
    return flat[scores + off >= cutoff]
