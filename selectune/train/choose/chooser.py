"""Choosers decide, step by step, which entries are trained. The tracker says when; a chooser says which.

before forward   `ahead`: selections that read no gradient of the coming step
backward         `passes`: how many passes of a window `offer` their dense gradients, one tensor at a time
close            after the last of them: the ledger changes, and new entries come with their gradients
step             `commit`, or `undo` if the step was skipped
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selectune.errors import some
from selectune.method import Method
from selectune.scope import ScopedTensor
from selectune.scores import constant
from selectune.train.choose import shares
from selectune.train.choose.products import Products
from selectune.train.optim.contract import NewEntries
from selectune.train.support.ledger import Ledger, Snapshot
from selectune.train.window import Clock, scattered
from selectune.train.world import World
from selectune.types import Allocating, Collector, Schedule

log = logging.getLogger("selectune")


@dataclass(frozen=True)
class Selection:
    """A change of the support: the ledger before it, the slots of new entries (k,) and their gradients (k,)."""

    before: Snapshot
    slots: Tensor
    gradients: Tensor


class Chooser:
    """The contract, and what all choosers share. This one never chooses."""

    def __init__(
        self,
        method: Method,
        schedule: Schedule | None,
        ledger: Ledger,
        seed: int,
        rescore: Callable[[], Sequence[Tensor]] | None = None,
    ) -> None:
        self.method, self.schedule, self.ledger, self.seed = method, schedule, ledger, seed
        self.rescore = rescore  # gives calibrated scores at the present weights
        self.tensors, self.score = ledger.tensors, method.score or constant()
        self.sizes = [tensor.form.numel() for tensor in self.tensors]
        select = method.select
        self.shares = select.shares(t.weight for t in self.tensors) if isinstance(select, Allocating) else None
        self.products = Products(self.score)
        self.clock = Clock()
        self.events: Counter[str] = Counter()
        self.beyond_rows: set[int] = set()  # tensors used in other ways than looking up rows: their padding row counts
        self.new_entries: NewEntries | None = None  # they took over slots, whose optimizer state is another entry's
        self.factors: tuple[Tensor, Tensor] | None = None  # the optimizer's numbers for rows and columns
        self.watching = False  # gradients of entries outside the support are formed too
        self.dense = False  # every entry in scope is trained at present, as torch does it
        self.cutoff: float | None = None  # the smallest score of the last selection in backward, if it is known
        self._ahead = -1  # the step of the last selection before forward
        self._collector: Collector | None = None
        self._broken: list[str] = []  # tensors whose scores are not finite
        self._finite: list[tuple[str, Tensor]] = []  # queued answers: whether a tensor's scores are finite, bool ()

    # -- when

    def quota(self, step: int) -> int:
        """How many entries the schedule asks for at this step."""
        return 0

    def passes(self, step: int, accumulation_steps: int) -> int:
        """How many backward passes of this step's window, from the first on, offer their dense gradients."""
        return 0

    def switch_phase(self) -> bool:
        """Begins or ends a dense phase if it is time; returns whether it did."""
        return False

    # -- which

    def prepare(self, scores: Sequence[Tensor] | None = None) -> None:
        """Ranks the entries for the whole run, by their weights or by these calibrated scores."""

    def ahead(self, step: int) -> bool:
        """Selects before forward if it is time; returns whether it did."""
        return False

    def offer(self, step: int, index: int, gradient: Tensor, rows: Tensor | None = None) -> None:
        """Takes the dense gradient of one tensor, or the rows of it that are not 0; it is freed afterwards."""

    def takes_factors(self, step: int, index: int, dy: Tensor, x: Tensor) -> bool:
        """Whether `offer_factors` would use such factors."""
        del step, index, dy, x
        return False

    def offer_factors(self, step: int, index: int, dy: Tensor, x: Tensor) -> tuple[bool, Tensor | None]:
        """Takes the dense gradient dy^T x of one tensor before it is formed: whether the factors are enough.

        Also the dense gradient, if it was formed; where the factors are not enough it is offered.
        """
        del step, index, dy, x
        return False, None

    def offer_share(self, step: int, index: int, share: Tensor, world: World) -> bool:
        """Takes this rank's share of a mean dense gradient, together with all ranks; False if the mean is wanted."""
        collector, taken = self._offered(step, index)
        finite = shares.offer(collector, self.score, self.reached(index), taken, share, world)
        if finite is False:
            self._broken.append(self.tensors[index].name)
        return finite is not None

    def _offered(self, step: int, index: int) -> tuple[Collector, Tensor | None]:
        """The collector of the present selection, and the entries of a tensor (ascending) that it may not take."""
        if self._collector is None:
            self._collector = self.collector(self.quota(step))
        return self._collector, self._taken(index)

    def close(self, step: int) -> Selection | None:
        """Changes the support after the last offer; None if nothing changed."""
        return None

    def add_watched(self, pieces: Mapping[int, Tensor]) -> None:
        """Takes the gradients of watched entries in one backward pass, by tensor."""

    def forget(self) -> None:
        """A backward pass broke off: its offers are void."""
        self._collector, self._finite = None, []

    # -- the step

    def commit(self, step: int, scale: float) -> None:
        """The optimizer has taken step number `step - 1`, with `scale` times the gradient of the backward passes."""
        self.new_entries = None

    def undo(self) -> None:
        """The window's step was skipped; the ledger is restored already."""
        self._collector, self._broken, self._finite = None, [], []

    # -- in a dense phase

    def refresh(self) -> None:
        """Writes the weights that follow from the latents, if these changed."""

    def write_weights(self) -> None:
        """Writes the weights that follow from the latents."""

    def weights_changed(self) -> None:
        """Somebody loaded weights into the model."""

    def leave(self) -> None:
        """The tuner comes off the model, whose weights are the base again."""

    # -- a later process

    def state(self) -> dict[str, Any]:
        """What a later process needs beside the ledger: tensors and plain values. Taken between steps."""
        new = self.new_entries
        news = None if new is None else {k: getattr(new, k) for k in ("slots", "mean", "square", "age")}
        return {"ahead": self._ahead, "news": news}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave; the ledger is loaded already."""
        self._ahead = int(state["ahead"])
        self.new_entries = None if state["news"] is None else NewEntries(**state["news"])

    # -- shared by the choosers

    def collector(self, quota: int) -> Collector:
        """A collector of `quota` entries; one that allocates completes every tensor's share of the support."""
        select, counts = self.method.select, self.allocated(quota)
        if counts is None or not isinstance(select, Allocating):
            return select.collector(quota, self.sizes, self.seed)
        return select.per_tensor(counts, self.sizes, self.seed)

    def allocated(self, quota: int) -> list[int] | None:
        """How many of `quota` further entries each tensor gets; None if the selection does not say so in advance."""
        select = self.method.select
        if not isinstance(select, Allocating):
            return None
        held = [0 if self._taken(t.index) is None else self.ledger.pages[t.index].flat.numel() for t in self.tensors]
        shares = select.allocate(sum(held) + quota, [t.eligible for t in self.tensors], self.shares)
        counts = [max(0, share - has) for share, has in zip(shares, held, strict=True)]
        for j in reversed(range(len(counts))):  # shares may shrink by one where others grow
            counts[j] -= min(counts[j], max(0, sum(counts) - quota))
        return counts

    def _taken(self, index: int) -> Tensor | None:
        """Flat indices (ascending) of a tensor that may not be chosen."""
        return self.ledger.pages[index].flat

    def reached(self, index: int) -> ScopedTensor:
        """A tensor, whose padding row may be chosen if it gets gradients too."""
        tensor = self.tensors[index]
        return replace(tensor, padding=range(0)) if tensor.padding and index in self.beyond_rows else tensor

    def scannable(
        self, index: int, gradient: Tensor, rows: Tensor | None
    ) -> tuple[ScopedTensor, Tensor, Tensor | None]:
        """A tensor, its gradient and the rows of it that are not 0, as `scan` takes them."""
        tensor = self.reached(index)
        if rows is not None and self.score.above is None:
            gradient, rows = scattered(gradient, rows, tensor), None  # entries of gradient 0 may be chosen
        return tensor, gradient, rows

    def clear_gradients(self, slots: Tensor) -> None:
        """Earlier passes of the window gave these slots, and free ones, gradients of entries that have left."""
        gradient = self.ledger.offsets.grad
        if gradient is not None:
            gradient[slots] = 0
            gradient[self.ledger.free] = 0

    def report_broken(self, step: int) -> bool:
        """Whether any score was not finite; then warns, and nothing is selected."""
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
            step, some([f'"{n}"' for n in names]),
        )  # fmt: skip
        return True


def seed_of(seed: int, step: int) -> int:
    """A seed for one step of a run."""
    return (seed * 0x9E3779B97F4A7C15 + step) % (1 << 63)
