"""A linear weight's gradient, given as its factors dy^T x: the entries that score enough, each by one canonical score.

For a quota of a few thousand entries almost no entry of a tensor is selected. Bounds dismiss nearly all of them without
the gradient in float32 (`ops.bounds`); where they do not pay, the dense product does. Either way the candidates that
are left get their gradients as sums in float64 in the order of the tokens, and their scores in float64. So what is
selected depends on the factors and the weights alone: on no library of products, thread, instruction set or way.

A score takes part if it says what it multiplies |g| by (`types.Score.weighting`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selectune import ops
from selectune.ops.bounds import FEW, Factors, Weighting, above, nearer
from selectune.scope import ScopedTensor
from selectune.select import GlobalCollector, PerTensorCollector, takes_the_best
from selectune.train.choose.scan import barred_entries, reaching, scan
from selectune.types import Collector, Score

CANONICAL = 4096
"""Quotas of up to so many entries, or up to one in so many of all, get canonical scores."""


@dataclass(frozen=True)
class Offered:
    """What one tensor's offer took, for whoever measures it."""

    collector: GlobalCollector | PerTensorCollector
    tensor: ScopedTensor
    taken: Tensor | None  # (k,) flat positions that could not be chosen
    candidates: int | None  # that bounds left of all entries; None: the dense product was formed


class Products:
    """Offers gradients that are given as dy^T x."""

    def __init__(self, score: Score) -> None:
        self.score = score
        self.weighting = None if score.weighting is None else Weighting(score.weigh)
        self.report: Callable[[Offered, Factors], None] | None = None

    def takes(self, collector: Collector, tensor: ScopedTensor, dy: Tensor, x: Tensor) -> bool:
        """Whether a tensor's candidates get canonical scores, by what is asked for, the dtypes and shapes alone."""
        return (
            self.weighting is not None
            and takes_the_best(collector)
            and canonical(collector.of(tensor.index), tensor, dy, x)
        )

    def offer(
        self, collector: Collector, tensor: ScopedTensor, taken: Tensor | None, dy: Tensor, x: Tensor
    ) -> tuple[bool, Tensor | None]:
        """Offers one tensor: whether it could, and its dense gradient if that was formed."""
        if self.weighting is None or not takes_the_best(collector):
            return False, None
        mine = collector.of(tensor.index)
        if not canonical(mine, tensor, dy, x):
            return False, None
        search = _Search(mine, self.score, self.weighting, tensor, taken, Factors(dy, x))
        enough = search.run()
        if self.report is not None:
            self.report(Offered(collector, tensor, taken, search.candidates), search.factors)
        return enough, search.whole


def canonical(collector: GlobalCollector, tensor: ScopedTensor, dy: Tensor, x: Tensor) -> bool:
    """Whether a tensor's candidates get canonical scores: by what is asked for and the dtypes, never by the numbers.

    Products of float32 must be of float32: torch.set_float32_matmul_precision may allow coarser ones, which no bound
    here covers.
    """
    weight = tensor.form
    return (
        0 < collector.quota <= min(largest(collector.entries), weight.numel())
        and dy.dtype == x.dtype == weight.dtype == torch.float32
        and dy.device.type == weight.device.type == "cpu"
        and torch.get_float32_matmul_precision() == "highest"
    )


def largest(entries: int) -> int:
    """The largest quota, of so many entries, whose candidates get canonical scores.

    >>> largest(1_000_000), largest(67_000_000)
    (4096, 16357)
    """
    return max(CANONICAL, entries // CANONICAL)


class _Search:
    """The entries of one tensor that a collector may take."""

    def __init__(
        self,
        collector: GlobalCollector,
        score: Score,
        weighting: Weighting,
        tensor: ScopedTensor,
        taken: Tensor | None,
        factors: Factors,
    ) -> None:
        self.collector, self.score, self.weighting, self.factors = collector, score, weighting, factors
        self.tensor, self.taken, self.barred = tensor, taken, barred_entries(tensor, taken)
        self.weight = tensor.weight.to(tensor.form.dtype)  # as it is, unless it is quantised
        self.whole: Tensor | None = None  # the dense gradient, if it was formed
        self.candidates: int | None = None

    def run(self) -> bool:
        """Offers them; False if a score is not finite."""
        self.collector.tighten()
        cutoff, factors = self.collector.cutoff, self.factors
        flat = above(factors, self.weight, self.weighting, cutoff, self.collector.quota, self.barred)
        if flat is None:
            self.whole = ops.weight_gradient(factors.dy, factors.x)
            flat = self._in_dense(cutoff)
            if flat is None:
                return False
            flat = flat[~torch.isin(flat, self.barred)]
        else:
            self.candidates = flat.numel()
            flat = flat[~torch.isin(flat, self.barred)]
            if flat.numel() > FEW:
                flat = self._nearer(flat, cutoff)
        gradient, scores = self._scored(flat)
        if not bool(torch.isfinite(scores.float()).all()):
            return False
        if self.score.above is not None:
            good = scores > self.score.above
            flat, scores, gradient = flat[good], scores[good], gradient[good]
        self.collector.offer(self.tensor.index, flat, scores, gradient.float())
        return True

    def _scored(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients and canonical scores of entries (m,), float64."""
        gradient = self.factors.exact(flat)
        return gradient, self.score(self.weight.reshape(-1)[flat].double(), gradient)

    def _least(self, flat: Tensor) -> float:
        """A cutoff: the least score of as many entries as are wanted; -inf if there are not so many."""
        return float(self._scored(flat)[1].min()) if flat.numel() >= self.collector.quota else -math.inf

    def _nearer(self, flat: Tensor, cutoff: float) -> Tensor:
        """Those of the candidates (m,) that may reach the cutoff, by sums in float32."""
        width = self.weight.shape[1]
        sums = ops.sampled_matmul(self.factors.dy, self.factors.x, flat // width, flat % width)
        if cutoff == -math.inf:
            rough = self.score(self.weight.reshape(-1)[flat], sums)
            cutoff = self._least(flat[rough.topk(min(flat.numel(), self.collector.quota)).indices])
        return nearer(self.factors, self.weight, self.weighting, cutoff, flat, sums)

    def _in_dense(self, cutoff: float) -> Tensor | None:
        """Candidates by the dense gradient, of which no sum is exact; None if a score or a norm is not finite."""
        whole, wrong = self.whole, self.factors.rounding() * self.factors.largest()
        if whole is None or not math.isfinite(wrong):
            return None
        if cutoff == -math.inf:  # nothing is known yet: the best of this tensor, by what the sums are
            index = self.tensor.index
            own = GlobalCollector(self.collector.quota, [0] * index + [self.weight.numel()], None)
            if not scan(own, self.score, self.tensor, self.taken, whole):
                return None
            cutoff = self._least(own.close()[1])
        flat = self._roughly(whole.reshape(-1), cutoff, wrong)
        return (
            None
            if flat is None
            else nearer(self.factors, self.weight, self.weighting, cutoff, flat, whole.reshape(-1)[flat])
        )

    def _roughly(self, whole: Tensor, cutoff: float, wrong: float) -> Tensor | None:
        """Entries whose score may reach the cutoff if every gradient is wrong by `wrong`; None if one is not finite."""
        weight = self.weight.reshape(-1)
        return reaching(self.score, weight, whole, cutoff, 2 * wrong * self.weighting.top(weight), wrong)
