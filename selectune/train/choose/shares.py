"""A gradient that is the mean of several ranks' shares, of which only entries that may be selected travel.

A score |g| weighting(|w|) of a mean is at most the mean of the ranks' own scores, hence at most the largest of them. So
an entry that reaches the cutoff reaches it on some rank, and no other need be told of.

few    each rank lists its entries that reach the cutoff; the lists travel, and the gradients at these entries
parts  where these are too many, or a score is of another form: each rank scores the mean of one part of the gradient,
       and the best of each part travel

In both, every rank then offers the same entries with the same numbers.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from selectune.ops.bounds import LEAST, SAFE
from selectune.scope import ScopedTensor
from selectune.select import GlobalCollector, takes_the_best
from selectune.train.choose.scan import reaching, scan
from selectune.train.world import World
from selectune.types import Collector, Score

SMALL = 1 << 14
"""Entries: the mean of a smaller tensor is formed whole, since every exchange has a cost of its own."""

FEW = 16
"""Lists together may have one in so many entries of a tensor, each counted as long as the longest."""


def offer(
    collector: Collector, score: Score, tensor: ScopedTensor, taken: Tensor | None, share: Tensor, world: World
) -> bool | None:
    """Offers one tensor, whose gradient is the mean of the ranks' shares: whether all scores that count are finite.

    None, on all ranks, where the whole mean is to be formed: of a small tensor, of one with too many entries to tell
    of, or for a collector of a user's own.
    """
    if share.numel() < SMALL or not takes_the_best(collector):
        return None
    shares = _Shares(collector.of(tensor.index), score, tensor, taken, share, world)
    return True if shares.few() else shares.parts()


class _Shares:
    """One tensor of all ranks. What decides is the same on all of them, so they exchange the same things."""

    def __init__(
        self,
        collector: GlobalCollector,
        score: Score,
        tensor: ScopedTensor,
        taken: Tensor | None,
        share: Tensor,
        world: World,
    ) -> None:
        self.collector, self.score, self.tensor, self.taken, self.world = collector, score, tensor, taken, world
        self.share = share.reshape(-1)
        self.weight = tensor.weight.reshape(-1)  # which all ranks may have to gather together
        self.room = share.numel() // FEW // world.ranks  # the longest list

    @cached_property
    def barred(self) -> Tensor:
        """Entries that may not be chosen."""
        padding = torch.arange(self.tensor.padding.start, self.tensor.padding.stop, device=self.share.device)
        return padding if self.taken is None else torch.cat((padding, self.taken.to(padding.device)))

    def _between(self, start: int, end: int) -> ScopedTensor:
        """A part of the flat tensor."""
        part, padding = nn.Parameter(self.weight[start:end], requires_grad=False), self.tensor.padding
        inside = range(max(0, min(padding.start, end) - start), max(0, min(padding.stop, end) - start))
        return ScopedTensor(self.tensor.index, self.tensor.names, part, inside)

    # -- few

    def few(self) -> bool:
        """Offers the entries that reach the cutoff on some rank; False, with nothing offered, if they are too many."""
        self.collector.tighten()
        cutoff, quota = self.collector.cutoff, self.collector.quota
        if self.score.weighting is None or quota == 0:
            return False
        if cutoff == -math.inf:
            best = None if quota > self.room else self._together(self._best())
            if best is None or best[1].numel() < quota:
                return False
            cutoff = float(best[1].topk(quota).values[-1])
        if cutoff < LEAST:
            return False  # it would let through every entry, whatever its gradient
        found = self._together(self._reaching(cutoff))
        if found is None:
            return False
        self.collector.offer(self.tensor.index, *found)
        return True

    def _best(self) -> Tensor | None:
        """The best entries of this rank's share; None if a score is not finite."""
        own = self.collector.like(0)
        if not scan(own, self.score, self._between(0, self.share.numel()), self.taken, self.share):
            return None
        return own.rows(self.tensor.index)[1].to(self.share.device)

    def _reaching(self, cutoff: float) -> Tensor | None:
        """The entries of this rank's share that reach a cutoff; None if a score is not finite."""
        flat = reaching(self.score, self.weight, self.share, cutoff, SAFE * cutoff)
        return None if flat is None else flat[~torch.isin(flat, self.barred)]

    def _together(self, flat: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Entries that any rank lists, their scores and gradients, the means in float64, as far as they are eligible.

        None if a rank has no list, or the lists are too long.
        """
        counts = self.world.gather([-1 if flat is None else flat.numel()])[:, 0].tolist()
        if flat is None or min(counts) < 0 or max(counts) > self.room:
            return None
        listed: Tensor = self.world.joined(flat.unsqueeze(0), counts).unique()
        gradient = self.world.mean(self.share[listed].double())
        scores = self.score(self.weight[listed].double(), gradient)
        good = scores > (-math.inf if self.score.above is None else self.score.above)
        return listed[good], scores[good], gradient[good]

    # -- parts

    def parts(self) -> bool | None:
        """Offers the best entries of each part; False if a score is not finite, None if they cannot be told so."""
        if self.collector.quota > self.room or not self.world.scatters(self.share):
            return None
        start, mean = self.world.part(self.share)
        end = start + mean.numel()
        own, taken = self.collector.like(start), self.taken
        if taken is not None:
            taken = taken[(taken >= start) & (taken < end)] - start
        finite = scan(own, self.score, self._between(start, end), taken, mean)
        scores, flat, gradient = own.rows(self.tensor.index)
        counts = self.world.gather([flat.numel() if finite else -1])[:, 0].tolist()
        if min(counts) < 0:
            return False
        rows = self.world.joined(torch.stack((scores, (flat + start).double(), gradient)).to(mean.device), counts)
        self.collector.offer(self.tensor.index, rows[1].long(), rows[0], rows[2])
        return True
