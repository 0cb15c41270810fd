"""The choosers of most methods: `Growing`, whose support only grows, and `Afresh`, which chooses all of it again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selectune.train.choose.chooser import Chooser, Ground, seed_of
from selectune.train.choose.scan import queues, scan, scan_queued
from selectune.train.ledger import Snapshot
from selectune.train.optim.contract import News
from selectune.train.window import scattered
from selectune.types import Queueing, Reads

log = logging.getLogger("selectune")


class Growing(Chooser):
    """The best entries that are not in the support yet join it; none leaves."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground)
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

    def expected(self) -> tuple[Tensor, Tensor] | None:
        """The order of what is still to be selected: the known one, or what it will be where nothing is selected yet.

        None where it is not known beforehand. Nothing is changed.
        """
        if self._queue is None and self.ledger.touched == 0:
            events = self.events.copy()
            found = self._rank(0, self.ledger.offsets.numel())
            self.events.clear()
            self.events.update(events)
            return found
        return self._queue

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

    def expected(self) -> tuple[Tensor, Tensor] | None:
        """The order of what is still to be selected: the known one, or what it will be where nothing is selected yet.

        None where it is not known beforehand. Nothing is changed.
        """
        if self._queue is None and self.ledger.touched == 0:
            events = self.events.copy()
            found = self._rank(0, self.ledger.offsets.numel())
            self.events.clear()
            self.events.update(events)
            return found
        return self._queue

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
