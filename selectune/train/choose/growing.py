"""The choosers of most methods: `Growing`, whose support only grows, and `Afresh`, which chooses all of it again."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selectune import bits
from selectune.scope import ScopedTensor
from selectune.train.choose.chooser import Chooser, Selection, seed_of
from selectune.train.choose.scan import queues, scan, scan_queued
from selectune.train.choose.units import rank_units
from selectune.train.optim.contract import NewEntries
from selectune.types import Queueing, Reads

log = logging.getLogger("selectune")


class Growing(Chooser):
    """The best entries outside the support join it; none leaves."""

    _order: tuple[Tensor, Tensor] | None = None  # the entries still to be selected, if their order is known

    def quota(self, step: int) -> int:
        if self.schedule is None or not self.schedule.due(step):
            return 0
        return max(0, self.schedule.target(step) - self.ledger.selected)

    def passes(self, step: int, accumulation_steps: int) -> int:
        return accumulation_steps if self.score.reads is Reads.GRADIENT and self.quota(step) > 0 else 0

    # -- before forward

    @torch.no_grad()
    def prepare(self, scores: Sequence[Tensor] | None = None) -> None:
        self._order = self._rank(0, self.ledger.offsets.numel(), scores)

    def ahead(self, step: int) -> bool:
        quota = 0 if self.score.reads in (Reads.GRADIENT, Reads.CHANGE) else self.quota(step)
        if quota == 0 or self._ahead == step:
            return False
        self._ahead = step
        self._take(*self._next(step, quota))
        return True

    def _next(self, step: int, quota: int) -> tuple[Tensor, Tensor]:
        if self._order is None:
            self.prepare()
        tensors, flat = self._order or self._rank(step, quota)
        self._order = (tensors[quota:], flat[quota:])
        return tensors[:quota], flat[:quota]

    def _rank(self, step: int, quota: int, scores: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if scores is None and self.rescore is not None:
            scores = self.rescore()
        generator = torch.Generator().manual_seed(self._seed_of(step))
        if not self.method.structure.plain:
            return self._rank_units(quota, scores, generator)
        collector = self.collector(quota)
        for tensor in self.tensors:
            known = None if scores is None else scores[tensor.index]
            if self.score.reads is Reads.MATRIX:
                known = self.score(_wide(tensor))
            if not scan(collector, self.score, tensor, self._taken(tensor.index), generator=generator, known=known):
                self.events["nonfinite_selections"] += 1
                log.warning('Scores of "%s" are not finite; its entries from there on are left out.', tensor.name)
        tensors, flat, _ = collector.close()
        if scores is not None:
            self._report_zeros(tensors, flat, scores)
        return tensors, flat

    def _rank_units(
        self, quota: int, scores: Sequence[Tensor] | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        def scored(tensor: ScopedTensor) -> Tensor:
            if scores is not None:
                return scores[tensor.index]
            weight = _wide(tensor)
            whole = self.score.reads is Reads.MATRIX
            return self.score(weight if whole else weight.reshape(-1), None, generator).view(weight.shape)

        counts = self.allocated(quota)
        tensors, flat, broken = rank_units(
            self.method.structure, self.score, self.tensors, scored, generator, quota, counts
        )
        for name in broken:
            self.events["nonfinite_selections"] += 1
            log.warning('Scores of "%s" are not finite; the tensor is left out.', name)
        if scores is not None:
            self._report_zeros(tensors, flat, scores)
        return tensors, flat

    def _seed_of(self, step: int) -> int:
        """The seed of a score that draws: one order for the whole run."""
        return self.seed

    def _report_zeros(self, tensors: Tensor, flat: Tensor, scores: Sequence[Tensor]) -> None:
        """Warns if entries that score 0 are chosen, because fewer others score more than there is budget."""
        zeros = sum(
            int((scores[i].reshape(-1)[flat[tensors == i].to(scores[i].device)] == 0).sum())
            for i in torch.unique(tensors).tolist()
        )
        if zeros:
            self.events["zero_scores"] += zeros
            log.warning(
                "%d of the %d entries chosen score 0: too few others score more, so the model's order decides. A "
                "smaller budget, or more calibration data, avoids it.", zeros, flat.numel(),
            )  # fmt: skip

    # -- in backward

    def offer(self, step: int, index: int, gradient: Tensor, rows: Tensor | None = None) -> None:
        collector, taken = self._offered(step, index)
        tensor, gradient, rows = self.scannable(index, gradient, rows)
        if queues(tensor, collector) and isinstance(collector, Queueing):
            finite = scan_queued(collector, self.score, tensor, taken, gradient, rows)
            self._finite.append((tensor.name, finite))
        elif not scan(collector, self.score, tensor, taken, gradient, rows):
            self._broken.append(tensor.name)

    def takes_factors(self, step: int, index: int, dy: Tensor, x: Tensor) -> bool:
        return self.products.takes(self._offered(step, index)[0], self.tensors[index], dy, x)

    def offer_factors(self, step: int, index: int, dy: Tensor, x: Tensor) -> tuple[bool, Tensor | None]:
        collector, taken = self._offered(step, index)
        return self.products.offer(collector, self.reached(index), taken, dy, x)

    def close(self, step: int) -> Selection | None:
        if self.report_broken(step):
            return None
        quota = self.quota(step)
        if self._collector is None:  # no weight in scope got a gradient
            self.events["shortfall"] += quota
            return None
        tensors, flat, gradients = self._collector.close()
        cutoff = getattr(self._collector, "cutoff", -math.inf)  # queued scores leave it unknown
        self.cutoff = cutoff if math.isfinite(cutoff) else None
        self._collector = None
        if flat.numel() < quota:
            self.events["shortfall"] += quota - flat.numel()
        before = self.ledger.snapshot(trained=isinstance(self, Afresh))
        slots, new = self._take(tensors, flat)
        return Selection(before, slots, gradients[new])

    def _take(self, tensors: Tensor, flat: Tensor) -> tuple[Tensor, Tensor | slice]:
        """Changes the support; returns the slots of new entries, and which of the given ones are new."""
        return self.ledger.add(tensors, flat), slice(None)

    # -- a later process

    def state(self) -> dict[str, Any]:
        return super().state() | ({} if self._order is None else {"queue": self._order})

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._order = state.get("queue")

    def expected(self) -> tuple[Tensor, Tensor] | None:
        """The order of the entries still to be selected; if nothing is selected yet, as it will be.

        None if it cannot be known. Nothing is changed.
        """
        if self._order is None and self.ledger.touched == 0:
            events = self.events.copy()
            order = self._rank(0, self.ledger.offsets.numel())
            self.events.clear()
            self.events.update(events)
            return order
        return self._order


def _wide(tensor: ScopedTensor) -> Tensor:
    return tensor.weight.detach().to(bits.wide(tensor.weight.dtype))


class Afresh(Growing):
    """The support is chosen from all entries again at every selection."""

    def quota(self, step: int) -> int:
        return self.schedule.target(step) if self.schedule is not None and self.schedule.due(step) else 0

    def undo(self) -> None:
        super().undo()
        if self.score.reads is Reads.GRADIENT:
            self.new_entries = None

    def _next(self, step: int, quota: int) -> tuple[Tensor, Tensor]:
        return self._rank(step, quota)

    def _seed_of(self, step: int) -> int:
        return seed_of(self.seed, step)

    def _taken(self, index: int) -> Tensor | None:
        return None

    def _take(self, tensors: Tensor, flat: Tensor) -> tuple[Tensor, Tensor | slice]:
        new, slots = self.ledger.replace(tensors.cpu(), flat.cpu())
        self.clear_gradients(slots)
        self.new_entries = NewEntries(slots)
        return slots, new
