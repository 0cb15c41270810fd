"""Drop and grow: the least moved entries of every tensor are exchanged for better ones (`types.DropAndGrow`).

A score that reads the due step's gradient is served in backward, where the exchange happens too, so that new entries
are trained in that very step. Any other exchange happens before the forward of the due step; a window of watched
candidates then hands on the mean gradient and mean square of the entries that grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selectune.errors import OptimizerError
from selectune.scores import random
from selectune.train.choose.chooser import Chooser, Ground, seed_of
from selectune.train.choose.scan import NOT_ELIGIBLE, PIECE, scan
from selectune.train.ledger import Snapshot, matrix
from selectune.train.optim.contract import News
from selectune.train.window import scattered
from selectune.types import Allocating, Collector, DropAndGrow, Reads


class Dropping(Chooser):
    """The support of a schedule that drops and grows."""

    schedule: DropAndGrow  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground)
        self._steps = 0  # steps of the window so far
        self._sum: dict[int, Tensor] = {}  # gradients of watched entries (w_j,) by tensor: of the window's steps,
        self._square: dict[int, Tensor] = {}  # their squares,
        self._pending: dict[int, Tensor] = {}  # and of the passes of this step

    @property
    def _in_backward(self) -> bool:
        """Whether an exchange reads the gradient of its own step."""
        return self.score.reads is Reads.GRADIENT and self.schedule.window == 0

    def quota(self, step: int) -> int:
        if self.ledger.free.numel():
            return self.ledger.free.numel()
        return sum(self._counts(step)) if self.schedule.due(step) else 0

    def passes(self, step: int, accumulation_steps: int) -> int:
        if self._in_backward:
            return accumulation_steps if self.schedule.due(step) else 0
        return 1 if self.score.reads is Reads.GRADIENT and self.schedule.opens(step) else 0

    # -- before forward

    def ahead(self, step: int) -> bool:
        if self._ahead == step:
            return False
        self._ahead = step
        if self.ledger.free.numel():
            self._draw()
            return True
        if self._in_backward or not self.schedule.due(step):
            return False
        collector = self._grown(step)
        if collector is None:
            return False
        self._exchange(step, *collector.close())
        self.ledger.settle()
        self._end()
        return True

    def _draw(self) -> None:
        """The first support: entries of every tensor at random."""
        generator = torch.Generator().manual_seed(self.seed)
        collector = self.collector(self.ledger.free.numel())
        for tensor in self.tensors:
            scan(collector, random(), tensor, None, generator=generator)
        tensors, flat, _ = collector.close()
        self.ledger.add(tensors, flat)

    def _grown(self, step: int) -> Collector | None:
        """The best entries of every tensor to grow; None if they cannot be told."""
        if self.score.reads is Reads.GRADIENT:
            if self._steps == 0:
                return None  # no window was open: its scores were not finite
            return self._grown_from_window(step)
        collector = self._allocated(self._counts(step))
        generator = torch.Generator().manual_seed(seed_of(self.seed, step))
        factors = self.factors
        if self.score.reads is Reads.FACTORS and factors is None:
            raise OptimizerError(
                f"Step {step} chooses entries by what the optimizer holds for rows and columns, and no step of an "
                "optimizer that holds it was seen. Train with selectune.SparseSM3."
            )
        for tensor in self.tensors:
            taken = self._taken_in(step, tensor.index)
            if factors is not None:
                fine = self._scan_factors(collector, tensor.index, taken, *factors)
            else:
                fine = scan(collector, self.score, tensor, taken, generator=generator)
            if not fine:
                self._broken.append(tensor.name)
        return None if self.report_broken(step) else collector

    def _grown_from_window(self, step: int) -> Collector | None:
        collector = self._allocated(self._counts(step))
        for index, total in self._sum.items():
            page, tensor = self.ledger.pages[index], self.tensors[index]
            if page.watched is None:
                continue
            flat, total = page.watched.flat, total.to(page.flat.device)
            weight = tensor.parameter.detach().reshape(-1)[flat].to(total.dtype)
            scores = self.score(weight, total)
            if not bool(torch.isfinite(scores).all()):
                self._broken.append(tensor.name)
                continue
            if self.score.above is not None:
                scores = scores.masked_fill(scores <= self.score.above, NOT_ELIGIBLE)
            scores = scores.masked_fill(torch.isin(flat, self._taken_in(step, index)), NOT_ELIGIBLE)
            collector.offer(index, flat, scores)
        if self.report_broken(step):
            self._end()
            return None
        return collector

    def _scan_factors(self, collector: Collector, index: int, taken: Tensor, rows: Tensor, columns: Tensor) -> bool:
        """Scores of one tensor from its rows' and columns' numbers, some rows at a time: never the whole product."""
        weight = self.tensors[index].parameter
        forms = [matrix(t.parameter) for t in self.tensors]
        height, width = forms[index]
        above = sum(form[0] for form in forms[:index])
        left = sum(form[1] for form in forms[:index])
        r, c = rows[above : above + height].to(weight.device), columns[left : left + width].to(weight.device)
        padding = self.tensors[index].padding
        barred = torch.cat((taken, torch.arange(padding.start, padding.stop, device=taken.device)))
        at_once = max(1, PIECE // max(1, width))
        for top in range(0, height, at_once):
            block = r[top : top + at_once]
            scores = self.score(block.repeat_interleave(width), c.repeat(block.numel()))
            if not bool(torch.isfinite(scores).all()):
                return False
            if self.score.above is not None:
                scores = scores.masked_fill(scores <= self.score.above, NOT_ELIGIBLE)
            start = top * width
            mine = barred[(barred >= start) & (barred < start + scores.numel())] - start
            collector.offer(index, start, scores.index_fill(0, mine, NOT_ELIGIBLE))
        return True

    # -- in backward

    def offer(self, step: int, index: int, gradient: Tensor, rows: Tensor | None = None) -> None:
        if self._collector is None:
            held = [page.flat.numel() for page in self.ledger.pages]
            self._collector = self._allocated(self._counts(step) if self._in_backward else held)
        tensor = self.tensor(index)
        if rows is not None and self.score.above is None:
            gradient, rows = scattered(gradient, rows, tensor), None  # zeros may be chosen
        taken = self._taken_in(step, index) if self._in_backward else None  # selected entries may be candidates
        if not scan(self._collector, self.score, tensor, taken, gradient, rows):
            self._broken.append(tensor.name)

    def close(self, step: int, gradient: Tensor) -> Snapshot | None:
        if self.report_broken(step) or self._collector is None:
            return None
        tensors, flat, carried = self._collector.close()
        self._collector = None
        before = self.ledger.snapshot(trained=self._in_backward)
        if self._in_backward:
            self._exchange(step, tensors, flat, carried, gradient)
            return before
        self._end()
        self.watching = True
        for index in torch.unique(tensors).tolist():
            mine = tensors == index
            found, order = torch.sort(flat[mine])
            self.ledger.watch(index, found.to(self.tensors[index].parameter.device))
            self._pending[index] = carried[mine][order].to(self.ledger.offsets)
        return before

    def saw(self, pieces: Mapping[int, Tensor]) -> None:
        for index, piece in pieces.items():
            if index in self._pending:
                self._pending[index] += piece
            elif self.ledger.pages[index].watched is not None:
                self._pending[index] = piece.clone()

    def undo(self) -> None:
        super().undo()
        self._pending = {}
        if self._in_backward:
            self.news = None
        if self._steps == 0:
            self._end()  # the window opened in the step that was skipped, and may open anew

    def commit(self, step: int, scale: float) -> None:
        if self._in_backward and self.news is not None:
            self.ledger.settle()  # not before: a step that is skipped shall find the weights as they were
        super().commit(step, scale)
        if not self.watching:
            return
        for index, seen in self._pending.items():
            seen = seen * scale
            self._sum[index] = self._sum[index] + seen if index in self._sum else seen
            self._square[index] = self._square[index] + seen * seen if index in self._square else seen * seen
        self._pending = {}
        self._steps += 1

    def _end(self) -> None:
        """The window is over."""
        for index, page in enumerate(self.ledger.pages):
            if page.watched is not None:
                self.ledger.watch(index, None)
        self._sum, self._square, self._pending = {}, {}, {}
        self._steps, self.watching = 0, False

    # -- the exchange

    def _allocated(self, counts: Sequence[int]) -> Collector:
        select, sizes = self.method.select, [t.parameter.numel() for t in self.tensors]
        if not isinstance(select, Allocating):  # Method has refused it
            return select.collector(sum(counts), sizes, self.seed)
        return select.per_tensor(counts, sizes, self.seed)

    def _counts(self, step: int) -> list[int]:
        """How many entries of every tensor are exchanged."""
        share = self.schedule.share(step)
        return [math.floor(share * page.flat.numel()) for page in self.ledger.pages]

    def _smallest(self, index: int, count: int) -> Tensor:
        """Positions (count,) in a tensor's page of the entries to drop, smallest first, ties by flat index."""
        page = self.ledger.pages[index]
        size = (self.ledger.offsets.detach() if self.schedule.drop == "change" else self.ledger.values())[page.slot]
        return torch.argsort(size.abs(), stable=True)[:count].to(page.flat.device)

    def _taken_in(self, step: int, index: int) -> Tensor:
        """Flat indices (ascending) of a tensor that may not grow."""
        page = self.ledger.pages[index]
        if not self.schedule.regrow:
            return page.flat
        stays = torch.ones(page.flat.shape, dtype=torch.bool, device=page.flat.device)
        stays[self._smallest(index, math.floor(self.schedule.share(step) * page.flat.numel()))] = False
        return page.flat[stays]

    def _exchange(
        self, step: int, tensors: Tensor, flat: Tensor, carried: Tensor | None = None, gradient: Tensor | None = None
    ) -> None:
        """Puts the entries (tensors[k], flat[k]) in the place of as many of the smallest.

        One that is small itself stays as it is, with its value and state.
        """
        counts, fresh = self._counts(step), torch.ones(flat.numel(), dtype=torch.bool)
        watched = {i: p.watched.flat for i, p in enumerate(self.ledger.pages) if p.watched is not None}
        for index in torch.unique(tensors).tolist():
            page, mine = self.ledger.pages[index], tensors == index
            grown = flat[mine].to(page.flat.device)
            fresh[mine] = torch.isin(grown, page.flat, invert=True).cpu()
            small = self._smallest(index, counts[index])
            small = small[torch.isin(page.flat[small], grown, invert=True)]
            mask = torch.zeros(page.flat.shape, dtype=torch.bool, device=page.flat.device)
            mask[small[: int(fresh[mine].sum())]] = True
            self.ledger.drop(index, mask)
        tensors, flat = tensors[fresh], flat[fresh]
        slots = self.ledger.add(tensors, flat)
        self.clear(gradient, slots)
        if gradient is not None and carried is not None:
            gradient[slots] = carried[fresh].to(gradient)
        self.news = self._news(slots, tensors, flat, watched)

    def _news(self, slots: Tensor, tensors: Tensor, flat: Tensor, watched: Mapping[int, Tensor]) -> News:
        if self._steps == 0:
            return News(slots)
        mean, square = (torch.zeros(slots.shape).to(self.ledger.offsets) for _ in range(2))
        for index in torch.unique(tensors).tolist():
            mine = tensors == index
            at = torch.searchsorted(watched[index], flat[mine].to(watched[index].device)).to(mean.device)
            mine = mine.to(mean.device)
            mean[mine], square[mine] = self._sum[index][at] / self._steps, self._square[index][at] / self._steps
        return News(slots, mean, square, self._steps)

    # -- a later process

    def state(self) -> dict[str, Any]:
        watched = {i: p.watched.flat for i, p in enumerate(self.ledger.pages) if p.watched is not None}
        window = {"steps": self._steps, "watched": watched, "sum": self._sum, "square": self._square}
        return super().state() | {"window": window, "factors": self.factors}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        window, factors = state["window"], state["factors"]
        device = self.ledger.offsets.device
        self.factors = None if factors is None else (factors[0].to(device), factors[1].to(device))
        self._end()
        for index, flat in window["watched"].items():
            self.ledger.watch(int(index), flat.to(self.ledger.pages[int(index)].flat.device))
        self._sum = {int(i): t.to(device, copy=True) for i, t in window["sum"].items()}
        self._square = {int(i): t.to(device, copy=True) for i, t in window["square"].items()}
        self._steps, self.watching = int(window["steps"]), bool(window["watched"])
