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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from selectune.method import Method
from selectune.scope import ScopedTensor
from selectune.scores import constant
from selectune.train.ledger import Ledger, Snapshot
from selectune.train.optim.contract import News
from selectune.train.window import Clock
from selectune.types import Allocating, Collector, Schedule

log = logging.getLogger("selectune")


@dataclass
class Ground:
    """What the chooser of a run works on."""

    method: Method
    schedule: Schedule | None
    tensors: Sequence[ScopedTensor]
    ledger: Ledger
    seed: int
    rescore: Callable[[], Sequence[Tensor]] | None = None  # calibrated scores at the weights of now
    clock: Clock = field(default_factory=Clock)
    events: Counter[str] = field(default_factory=Counter)
    beyond_rows: set[int] = field(default_factory=set)  # tensors used otherwise than by looking up rows: padding counts


class Chooser:
    """The contract, and what all choosers share. This one never chooses."""

    def __init__(self, ground: Ground) -> None:
        self.method, self.schedule, self.tensors, self.ledger = (
            ground.method, ground.schedule, ground.tensors, ground.ledger,
        )  # fmt: skip
        self.seed, self.events, self.clock, self.beyond_rows = (
            ground.seed,
            ground.events,
            ground.clock,
            ground.beyond_rows,
        )
        self.rescore, self.score = ground.rescore, ground.method.score or constant()
        self.news: News | None = None  # entries that took over slots: the optimizer's state of these is stale
        self.factors: tuple[Tensor, Tensor] | None = None  # what the optimizer holds for rows and columns
        self.watching = False  # entries beside the selected ones are watched
        self.dense = False  # every entry in scope is trained at present, as torch does it
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

    def turn(self) -> bool:
        """Begins or ends a dense phase, if the schedule has one and it is time; whether it did."""
        return False

    def refresh(self) -> None:
        """In a dense phase: writes the weights that follow from what is trained."""

    def weights_changed(self) -> None:
        """In a dense phase: somebody loaded weights into the model."""

    def leave(self) -> None:
        """The tuner comes off the model, whose weights are the base again."""

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
        return replace(tensor, padding=range(0)) if tensor.padding and index in self.beyond_rows else tensor

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


def seed_of(seed: int, step: int) -> int:
    """A seed for one step of a run."""
    return (seed * 0x9E3779B97F4A7C15 + step) % (1 << 63)
