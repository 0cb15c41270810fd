"""Selection: scores x quota -> exactly that many entries.

One total order decides everything: score descending, tensor order, flat index ascending. Scores
arrive in pieces, one dense tensor at a time. A collector keeps candidates only, because the best q of
all entries are among the best q of every piece. So nothing of size N is built beside the present scores.

A collector takes scores in two ways. `offer` reads the numbers: a cutoff rules out most of the next piece, which is
fastest on a CPU. `queue` reads no number, so on a GPU the host does not wait: a piece costs one top-k of integer keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from selectune.errors import ConfigError
from selectune.quota import QUOTAS, divided
from selectune.seeds import STEP, finish, signed

Rows = tuple[Tensor, Tensor, Tensor]  # scores, positions in the total order, carried numbers

_SLACK = 1 << 10  # candidates kept beyond two quotas before they are sorted down to one


@dataclass(frozen=True)
class GlobalTopK:
    """The q best entries of all tensors together: exact count, exact ties.

    Among equal scores `tie="order"` prefers the earlier tensor and the lower index, and `tie="random"`
    follows a seeded shuffle. (Otherwise PaFi on LoRA, whose B matrices are all zeros, fills only the first layers.)
    """

    tie: str = "order"

    def __post_init__(self) -> None:
        if self.tie not in ("order", "random"):
            raise ConfigError(f"Unknown tie rule '{self.tie}'. Known: order, random.")

    def collector(self, quota: int, sizes: Sequence[int], seed: int) -> GlobalCollector:
        return GlobalCollector(quota, sizes, seed if self.tie == "random" else None)


@dataclass(frozen=True)
class PerTensor:
    """The best entries of each tensor; ties go by flat index.

    `quota` says how the budget is divided (`selectune.quota`): in proportion to "size", or to the "entropy" of a
    tensor's values times its size. (SpIEL's code rounds all parts down, so it stays below its budget.)

    >>> from selectune.select import PerTensor
    >>> PerTensor().allocate(10, [100, 50, 50, 3])
    [5, 3, 2, 0]
    """

    quota: str = "size"

    def __post_init__(self) -> None:
        if self.quota not in QUOTAS:
            raise ConfigError(f"Unknown quota {self.quota!r}. Known: {', '.join(QUOTAS)}.")

    def shares(self, weights: Iterable[Tensor]) -> list[int] | None:
        """What each tensor's part is in proportion to; None: its size."""
        return QUOTAS[self.quota](weights)

    def allocate(self, total: int, sizes: Sequence[int], shares: Sequence[int] | None = None) -> list[int]:
        """How many entries each tensor gets: at most its size, and `total` in all."""
        return divided(total, sizes, shares)

    def collector(self, quota: int, sizes: Sequence[int], seed: int) -> PerTensorCollector:
        return self.per_tensor(self.allocate(min(quota, sum(sizes)), sizes), sizes, seed)

    def per_tensor(self, counts: Sequence[int], sizes: Sequence[int], seed: int) -> PerTensorCollector:
        """A collector of the best `counts[j]` entries of every tensor j."""
        del seed
        return PerTensorCollector(counts, sizes)


def takes_the_best(collector: object) -> TypeGuard[GlobalCollector | PerTensorCollector]:
    """Whether a collector is one of ours, so that only the best scores of each tensor need be offered.

    A subclass of a user may take others.
    """
    return type(collector) in (GlobalCollector, PerTensorCollector)


class PerTensorCollector:
    """One collector per tensor; together they give the total order."""

    def __init__(self, counts: Sequence[int], sizes: Sequence[int]) -> None:
        self._all = GlobalCollector(sum(counts), sizes, None)
        self._each = [GlobalCollector(count, sizes, None) for count in counts]
        for each, size in zip(self._each, sizes, strict=True):
            each.entries = size

    def of(self, tensor: int) -> GlobalCollector:
        """The collector of one tensor's scores."""
        return self._each[tensor]

    def offer(self, tensor: int, flat: Tensor | int, scores: Tensor, carry: Tensor | None = None) -> None:
        """See `selectune.types.Collector`."""
        self._each[tensor].offer(tensor, flat, scores, carry)

    def queue(self, tensor: int, flat: Tensor | int, scores: Tensor, carry: Tensor | None = None) -> None:
        """See `selectune.types.Queueing`."""
        self._each[tensor].queue(tensor, flat, scores, carry)

    def close(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `selectune.types.Collector`."""
        for each in self._each:
            each._compress()
            self._all.kept += each.kept
            self._all.queued += [each.merged(part) for part in each.by_device()]
        return self._all.close()


class GlobalCollector:
    """Keeps the q best entries offered, for any order of offers and any division into pieces."""

    def __init__(self, quota: int, sizes: Sequence[int], tie_seed: int | None) -> None:
        self.quota = quota
        self.tie_seed = tie_seed
        self._starts = [0, *itertools.accumulate(sizes)]  # of each tensor in the total order
        self.entries = self._starts[-1]  # of which these are the best
        self.starts = torch.tensor(self._starts)
        self.cutoff = float("-inf")  # q entries with at least this score are known
        self.kept: list[Rows] = []
        self.count = 0
        self.queued: list[Rows] = []  # on their devices, at most `quota` each
        self.waiting = 0

    def of(self, tensor: int) -> GlobalCollector:
        """The collector of one tensor's scores: this one."""
        del tensor
        return self

    def like(self, shift: int) -> GlobalCollector:
        """A collector without entries, of the same quota, order and cutoff, whose offers lie `shift` further on."""
        other = GlobalCollector(self.quota, [], self.tie_seed)
        other._starts, other.cutoff = [start + shift for start in self._starts], self.cutoff
        return other

    def rows(self, tensor: int) -> Rows:
        """What is kept of offers from one tensor: scores, flat indices and carried numbers, in no particular order."""
        self._compress()
        scores, positions, carried = self.kept[0] if self.kept else (torch.zeros(0, dtype=torch.float64),) * 3
        return scores, positions.long() - self._starts[tensor], carried

    def offer(self, tensor: int, flat: Tensor | int, scores: Tensor, carry: Tensor | None = None) -> None:
        """See `selectune.types.Collector`."""
        if self.quota == 0:
            return
        good = scores > self.cutoff if self.cutoff == float("-inf") else scores >= self.cutoff
        where = good.nonzero().squeeze(1)
        if where.numel() == 0:
            return
        positions = (where + flat if isinstance(flat, int) else flat[where]) + self._starts[tensor]
        carried = torch.zeros_like(scores[where]) if carry is None else carry[where]
        self._keep(self._best((scores[where].double().cpu(), positions.cpu(), carried.double().cpu())))

    def queue(self, tensor: int, flat: Tensor | int, scores: Tensor, carry: Tensor | None = None) -> None:
        """See `selectune.types.Queueing`."""
        if self.quota == 0 or scores.numel() == 0:
            return
        start = self._starts[tensor]
        if self.tie_seed is None and scores.dtype == torch.float32:
            at = torch.topk(_keys(scores), min(self.quota, scores.numel()), sorted=False).indices
        else:
            every = torch.arange(scores.numel(), device=scores.device) + flat if isinstance(flat, int) else flat
            at = self._order(scores, every + start)[: self.quota]
        positions = (at + flat if isinstance(flat, int) else flat[at]) + start
        carried = torch.zeros_like(scores[at]) if carry is None else carry[at]
        self.queued.append((scores[at].double(), positions, carried.double()))
        self.waiting += at.numel()
        if self.waiting > 4 * self.quota + _SLACK:
            self.queued = [self.merged(part) for part in self.by_device()]
            self.waiting = sum(rows[0].numel() for rows in self.queued)

    def by_device(self) -> list[list[Rows]]:
        """The queued rows of each device."""
        devices = dict.fromkeys(rows[0].device for rows in self.queued)
        return [[rows for rows in self.queued if rows[0].device == device] for device in devices]

    def merged(self, rows: list[Rows]) -> Rows:
        """The best q rows of one device, in order."""
        scores, positions, carried = (torch.cat(part) for part in zip(*rows, strict=True))
        order = self._order(scores, positions)[: self.quota]
        return scores[order], positions[order], carried[order]

    def _close_queued(self) -> Rows:
        """The chosen rows of all devices, on the first one. The host waits here."""
        home = self.queued[0][0].device
        every = [(a.to(home), b.to(home), c.to(home)) for a, b, c in [*self.queued, *self.kept]]
        scores, positions, carried = self.merged(every)
        good = scores > float("-inf")
        return scores[good], positions[good], carried[good]

    def tighten(self) -> None:
        """Makes the cutoff the q-th best score so far."""
        self._compress()

    def close(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `selectune.types.Collector`."""
        self._compress()
        if self.queued:
            _, positions, carried = self._close_queued()
            starts = self.starts.to(positions.device)
            tensors = torch.searchsorted(starts, positions, right=True) - 1
            return tensors, positions - starts[tensors], carried
        if not self.kept:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
        scores, positions, carried = self.kept[0]
        order = self._order(scores, positions)
        positions, carried = positions[order], carried[order]
        tensors = torch.searchsorted(self.starts, positions, right=True) - 1
        return tensors, positions - self.starts[tensors], carried

    def _keep(self, rows: Rows) -> None:
        self.kept.append(rows)
        self.count += rows[0].numel()
        if self.count > 2 * self.quota + _SLACK or (self.cutoff == float("-inf") and self.count >= self.quota):
            self._compress()

    def _compress(self) -> None:
        """Reduces the kept rows to the best q, in no particular order."""
        if not self.kept:
            return
        rows = self.kept[0] if len(self.kept) == 1 else tuple(torch.cat(part) for part in zip(*self.kept, strict=True))
        rows = self._best((rows[0], rows[1], rows[2]))
        self.kept = [rows]
        self.count = rows[0].numel()
        if self.count == self.quota:
            self.cutoff = float(rows[0].min())

    def _best(self, rows: Rows) -> Rows:
        """The best q rows; only the ties at the edge are sorted."""
        scores, positions, carried = rows
        spare = scores.numel() - self.quota
        if spare <= 0:
            return rows
        edge = torch.from_numpy(np.partition(scores.numpy(), spare))[spare]  # the q-th best
        near = (scores > edge).nonzero().squeeze(1)
        level = (scores == edge).nonzero().squeeze(1)
        level = level[self._order(scores[level], positions[level])[: self.quota - near.numel()]]
        near = torch.cat((near, level))
        return scores[near], positions[near], carried[near]

    def _order(self, scores: Tensor, positions: Tensor) -> Tensor:
        """The permutation that sorts by (score descending, tie key, position ascending)."""
        order = torch.argsort(positions)
        if self.tie_seed is not None:
            order = order[torch.argsort(_hash(positions[order], self.tie_seed), stable=True)]
        return order[torch.argsort(scores[order], descending=True, stable=True)]


def _keys(scores: Tensor) -> Tensor:
    """Distinct int64 keys whose descending order is (score descending, position ascending).

    The upper half is an integer that grows with the float32 score (-0 counts as 0, as in any comparison).
    """
    bits = (scores + 0.0).view(torch.int32).long()
    rank = torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)
    return (rank << 32) - torch.arange(scores.numel(), device=scores.device)


def _hash(positions: Tensor, seed: int) -> Tensor:
    """A seeded hash of positions."""
    return finish(positions * signed(STEP) + seed * 0x2545F491)
