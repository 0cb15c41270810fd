"""Choosers: which entries are trained, decided step by step. The tracker says when; a chooser says which.

before forward   `ahead`: choices that read no gradient of the coming step
backward         `passes` of a window are shown as dense gradients, a tensor at a time, to `offer`
close            after the last of them: the ledger is changed, new entries get their gradient
step             `commit`, or `undo` where the step was skipped
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selectune.method import Method
from selectune.scope import ScopedTensor
from selectune.scores import constant
from selectune.train.ledger import Ledger, Snapshot
from selectune.train.scan import queues, scan, scan_queued
from selectune.types import Allocating, Collector, News, Queueing, Reads, Schedule

log = logging.getLogger("selectune")


class Chooser:
    """The contract, and what all choosers share. This one never chooses."""

    def __init__(
        self,
        method: Method,
        schedule: Schedule | None,
        tensors: Sequence[ScopedTensor],
        ledger: Ledger,
        seed: int,
        events: Counter[str],
    ) -> None:
        self.method, self.schedule, self.tensors, self.ledger = method, schedule, tensors, ledger
        self.seed, self.events = seed, events
        self.score = method.score or constant()
        self.rescore: Callable[[], Sequence[Tensor]] | None = None  # calibrated scores at the weights of now
        self.news: News | None = None  # entries that took over slots: the optimizer's state of these is stale
        self.factors: tuple[Tensor, Tensor] | None = None  # what the optimizer holds for rows and columns
        self.whole: set[int] = set()  # tensors of which more than looked-up rows is used: padding gets a gradient
        self.watching = False  # entries beside the selected ones are watched
        self._ahead = -1  # the step of the last choice before forward
        self._collector: Collector | None = None
        self._broken: list[str] = []  # tensors with non-finite scores
        self._finite: list[tuple[str, Tensor]] = []  # what is not known yet, bool () on its device

    def quota(self, step: int) -> int:
        """How many entries the schedule asks for at this step."""
        del step
        return 0

    def passes(self, step: int, accumulation_steps: int) -> int:
        """How many backward passes of this step's window are shown as dense gradients, from the first on."""
        del step, accumulation_steps
        return 0

    def prepare(self, ready: Sequence[Tensor] | None = None) -> None:
        """Ranks the entries beforehand, by weights or by scores that are `ready`."""

    def ahead(self, step: int) -> bool:
        """Chooses before forward, if it is time; whether it did."""
        del step
        return False

    def offer(self, step: int, index: int, gradient: Tensor, rows: Tensor | None = None) -> None:
        """The dense gradient of one tensor, whole; it is freed afterwards."""

    def close(self, step: int, gradient: Tensor) -> Snapshot | None:
        """Changes the support after the passes shown; writes new entries' gradients into `gradient` (B,).

        Returns the ledger as it was, or None if nothing was changed.
        """
        del step, gradient
        return None

    def saw(self, pieces: Mapping[int, Tensor]) -> None:
        """The gradients of watched entries in one backward pass, by tensor."""

    def forget(self) -> None:
        """The backward pass broke off: what it offered is void."""
        self._collector, self._finite = None, []

    def undo(self) -> None:
        """The window's step was skipped; the ledger is as it was."""
        self._collector, self._broken, self._finite = None, [], []

    def commit(self, step: int, scale: float) -> None:
        """The optimizer has stepped; `step` steps are done. `scale`: its gradient over that of the backward passes."""
        del step, scale
        self.news = None

    def state(self) -> dict[str, Any]:
        """What a later process needs beside the ledger: tensors and plain values. Taken between steps."""
        news = self.news
        told = None if news is None else {k: getattr(news, k) for k in ("slots", "mean", "square", "age")}
        return {"ahead": self._ahead, "news": told}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave, after the ledger is as it was."""
        self._ahead = int(state["ahead"])
        self.news = None if state["news"] is None else News(**state["news"])

    # -- for choosers

    def collector(self, quota: int) -> Collector:
        """A collector of `quota` entries; one that allocates completes every tensor's share of the support."""
        select, sizes = self.method.select, [t.parameter.numel() for t in self.tensors]
        if not isinstance(select, Allocating):
            return select.collector(quota, sizes, self.seed)
        held = [0 if self._taken(t.index) is None else self.ledger.pages[t.index].flat.numel() for t in self.tensors]
        shares = select.allocate(sum(held) + quota, [t.eligible for t in self.tensors])
        counts = [max(0, share - has) for share, has in zip(shares, held, strict=True)]
        for j in reversed(range(len(counts))):  # shares may shrink by one where others grow
            counts[j] -= min(counts[j], max(0, sum(counts) - quota))
        return select.per_tensor(counts, sizes, self.seed)

    def _taken(self, index: int) -> Tensor | None:
        """Flat indices of a tensor that may not be chosen."""
        return self.ledger.pages[index].flat

    def tensor(self, index: int) -> ScopedTensor:
        """A tensor and what of it may be chosen by its gradient: a row of padding too, where it gets one."""
        tensor = self.tensors[index]
        return replace(tensor, padding=range(0)) if tensor.padding and index in self.whole else tensor

    def clear(self, gradient: Tensor | None, slots: Tensor) -> None:
        """Gradients that belong to entries no longer there are 0."""
        for stale in (gradient, self.ledger.offsets.grad):
            if stale is not None:
                stale[slots] = 0
                stale[self.ledger.free] = 0

    def report_broken(self, step: int) -> bool:
        """Whether scores were not finite; says so once."""
        names, self._broken = self._broken, []
        waiting, self._finite = self._finite, []
        if waiting:
            flags = torch.stack([finite.to(waiting[0][1].device) for _, finite in waiting]).tolist()
            names += [name for (name, _), finite in zip(waiting, flags, strict=True) if not finite]
        if not names:
            return False
        self._collector = None
        self.events["nonfinite_selections"] += 1
        log.warning(
            "Step %d: scores of %s are not finite, so nothing is selected at this step; the quota is carried over.",
            step, ", ".join(f'"{n}"' for n in names[:3]) + (" ..." if len(names) > 3 else ""),
        )  # fmt: skip
        return True


class Growing(Chooser):
    """The best entries that are not in the support yet join it; none leaves."""

    def __init__(self, *ground: Any) -> None:
        super().__init__(*ground)
        self._queue: tuple[Tensor, Tensor] | None = None  # entries in the order known beforehand

    def quota(self, step: int) -> int:
        if self.schedule is None or not self.schedule.due(step):
            return 0
        return max(0, self.schedule.target(step) - self.ledger.selected)

    def passes(self, step: int, accumulation_steps: int) -> int:
        return accumulation_steps if self.score.reads is Reads.GRADIENT and self.quota(step) > 0 else 0

    def prepare(self, ready: Sequence[Tensor] | None = None) -> None:
        self._queue = self._rank(0, self.ledger.offsets.numel(), ready)

    def ahead(self, step: int) -> bool:
        quota = 0 if self.score.reads in (Reads.GRADIENT, Reads.CHANGE) else self.quota(step)
        if quota == 0 or self._ahead == step:
            return False
        self._ahead = step
        self._take(*self._next(step, quota), None, None)
        return True

    def offer(self, step: int, index: int, gradient: Tensor, rows: Tensor | None = None) -> None:
        if self._collector is None:
            self._collector = self.collector(self.quota(step))
        tensor = self.tensor(index)
        if rows is not None and self.score.above is None:
            gradient, rows = scattered(gradient, rows, tensor), None  # zeros may be chosen
        taken = self._taken(index)
        if isinstance(self._collector, Queueing) and queues(tensor, self._collector):
            finite = scan_queued(self._collector, self.score, tensor, taken, gradient, rows)
            self._finite.append((tensor.name, finite))
        elif not scan(self._collector, self.score, tensor, taken, gradient, rows):
            self._broken.append(tensor.name)

    def close(self, step: int, gradient: Tensor) -> Snapshot | None:
        if self.report_broken(step):
            return None
        quota = self.quota(step)
        if self._collector is None:  # no gradient of a weight in scope
            self.events["shortfall"] += quota
            return None
        tensors, flat, carried = self._collector.close()
        self._collector = None
        if flat.numel() < quota:
            self.events["shortfall"] += quota - flat.numel()
        before = self.ledger.snapshot(trained=isinstance(self, Afresh))
        self._take(tensors, flat, carried, gradient)
        return before

    def state(self) -> dict[str, Any]:
        return super().state() | ({} if self._queue is None else {"queue": self._queue})

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._queue = state.get("queue")

    def _next(self, step: int, quota: int) -> tuple[Tensor, Tensor]:
        if self._queue is None:
            self.prepare()
        tensors, flat = self._queue or self._rank(step, quota)
        self._queue = (tensors[quota:], flat[quota:])
        return tensors[:quota], flat[:quota]

    def _seed_of(self, step: int) -> int:
        """What a score that draws is seeded with: one order for the whole run."""
        del step
        return self.seed

    def _rank(self, step: int, quota: int, ready: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if ready is None and self.rescore is not None:
            ready = self.rescore()
        collector = self.collector(quota)
        generator = torch.Generator().manual_seed(self._seed_of(step))
        for tensor in self.tensors:
            known = None if ready is None else ready[tensor.index]
            if not scan(collector, self.score, tensor, self._taken(tensor.index), generator=generator, ready=known):
                self.events["nonfinite_selections"] += 1
                log.warning('Scores of "%s" are not finite; its entries from there on are left out.', tensor.name)
        tensors, flat, _ = collector.close()
        if ready is not None:
            self._report_zeros(tensors, flat, ready)
        return tensors, flat

    def _report_zeros(self, tensors: Tensor, flat: Tensor, ready: Sequence[Tensor]) -> None:
        """Entries that no gradient reached are chosen where fewer others score above 0 than the budget is."""
        zeros = sum(
            int((ready[i].reshape(-1)[flat[tensors == i].to(ready[i].device)] == 0).sum())
            for i in torch.unique(tensors).tolist()
        )
        if zeros:
            self.events["zero_scores"] += zeros
            log.warning(
                "%d of the %d entries chosen score 0: too few others score more, so the model's order decides. A "
                "smaller budget, or more calibration data, avoids it.", zeros, flat.numel(),
            )  # fmt: skip

    def _take(self, tensors: Tensor, flat: Tensor, carried: Tensor | None, gradient: Tensor | None) -> None:
        """Gives entries their slots and, where known, the gradient of this step."""
        slots = self.ledger.add(tensors, flat)
        if gradient is not None and carried is not None:
            gradient[slots] = carried.to(gradient)


class Afresh(Growing):
    """The support is chosen from all entries again at every selection."""

    def quota(self, step: int) -> int:
        return self.schedule.target(step) if self.schedule is not None and self.schedule.due(step) else 0

    def undo(self) -> None:
        super().undo()
        if self.score.reads is Reads.GRADIENT:
            self.news = None

    def _seed_of(self, step: int) -> int:
        return seed_of(self.seed, step)

    def _next(self, step: int, quota: int) -> tuple[Tensor, Tensor]:
        return self._rank(step, quota)

    def _taken(self, index: int) -> Tensor | None:
        del index
        return None

    def _take(self, tensors: Tensor, flat: Tensor, carried: Tensor | None, gradient: Tensor | None) -> None:
        tensors, flat, carried = tensors.cpu(), flat.cpu(), None if carried is None else carried.cpu()
        fresh, slots = self.ledger.replace(tensors, flat)
        self.clear(gradient, slots)
        self.news = News(slots)
        if gradient is not None and carried is not None:
            gradient[slots] = carried[fresh].to(gradient)


def seed_of(seed: int, step: int) -> int:
    """A seed for one step of a run."""
    return (seed * 0x9E3779B97F4A7C15 + step) % (1 << 63)


def scattered(block: Tensor, rows: Tensor, tensor: ScopedTensor) -> Tensor:
    """Rows of a gradient as the dense gradient they stand for."""
    dense = block.new_zeros(tensor.parameter.shape)
    return dense.index_copy_(0, rows, block)
