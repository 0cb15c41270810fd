"""Drop and grow: in every tensor the least moved entries make room for better ones (`types.DropAndGrow`).

A score that reads the due step's gradient drops and grows in backward, so that new entries are trained in that very
step. Any other score does so before the forward of the due step. With a window, candidates are watched up to then, and
the entries that grow pass on the mean and the mean square of their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selectune.errors import OptimizerError
from selectune.scores import random
from selectune.train.choose.chooser import Chooser, Selection, seed_of
from selectune.train.choose.scan import NOT_ELIGIBLE, PIECE, scan
from selectune.train.optim.contract import NewEntries
from selectune.train.support.positions import matrix
from selectune.types import Allocating, Collector, DropAndGrow, Reads


class Dropping(Chooser):
    """The support of a schedule that drops and grows."""

    schedule: DropAndGrow  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._steps = 0  # steps of the window so far
        self._sum: dict[int, Tensor] = {}  # by tensor, gradients of watched entries (w_j,) summed over the window,
        self._square: dict[int, Tensor] = {}  # their squares,
        self._pending: dict[int, Tensor] = {}  # and gradients summed over this step's passes

    @property
    def _in_backward(self) -> bool:
        """Whether the score reads the gradient of the due step itself."""
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
        collector = self._scored(step)
        if collector is None:
            return False
        tensors, flat, _ = collector.close()
        self._drop_and_grow(step, tensors, flat)
        self.ledger.settle()
        self._end_window()
        return True

    def _draw(self) -> None:
        """The first support: entries of every tensor at random."""
        generator = torch.Generator().manual_seed(self.seed)
        collector = self.collector(self.ledger.free.numel())
        for tensor in self.tensors:
            scan(collector, random(), tensor, None, generator=generator)
        tensors, flat, _ = collector.close()
        self.ledger.add(tensors, flat)

    def _scored(self, step: int) -> Collector | None:
        """The best entries of every tensor to grow; None if they are not known."""
        if self.score.reads is Reads.GRADIENT:
            return self._scored_by_window(step) if self._steps else None  # no window: its scores were not finite
        collector = self._allocated(self._counts(step))
        generator = torch.Generator().manual_seed(seed_of(self.seed, step))
        factors = self.factors
        if self.score.reads is Reads.FACTORS and factors is None:
            raise OptimizerError(
                f"Step {step} chooses entries by the optimizer's numbers for rows and columns, and no step of an "
                "optimizer that has them was seen. Train with selectune.SparseSM3."
            )
        for tensor in self.tensors:
            taken = self._taken_at(step, tensor.index)
            if factors is not None:
                finite = self._scan_factors(collector, tensor.index, taken, *factors)
            else:
                finite = scan(collector, self.score, tensor, taken, generator=generator)
            if not finite:
                self._broken.append(tensor.name)
        return None if self.report_broken(step) else collector

    def _scored_by_window(self, step: int) -> Collector | None:
        collector = self._allocated(self._counts(step))
        for index, total in self._sum.items():
            page, tensor = self.ledger.pages[index], self.tensors[index]
            if page.watched is None:
                continue
            flat, total = page.watched.flat, total.to(page.flat.device)
            scores = self._eligible(self.score(self.ledger.store.numbers(index, flat).to(total.dtype), total))
            if scores is None:
                self._broken.append(tensor.name)
                continue
            scores = scores.masked_fill(torch.isin(flat, self._taken_at(step, index)), NOT_ELIGIBLE)
            collector.offer(index, flat, scores)
        if self.report_broken(step):
            self._end_window()
            return None
        return collector

    def _scan_factors(self, collector: Collector, index: int, taken: Tensor, rows: Tensor, columns: Tensor) -> bool:
        """Scores a tensor by its rows' and columns' numbers, some rows at a time; False if a score is not finite."""
        device, padding = self.tensors[index].form.device, self.tensors[index].padding
        forms = [matrix(t.form) for t in self.tensors]
        height, width = forms[index]
        above, left = (sum(form[side] for form in forms[:index]) for side in (0, 1))
        r, c = rows[above : above + height].to(device), columns[left : left + width].to(device)
        barred = torch.cat((taken, torch.arange(padding.start, padding.stop, device=taken.device)))
        at_once = max(1, PIECE // max(1, width))
        for top in range(0, height, at_once):
            block, start = r[top : top + at_once], top * width
            scores = self._eligible(self.score(block.repeat_interleave(width), c.repeat(block.numel())))
            if scores is None:
                return False
            mine = barred[(barred >= start) & (barred < start + scores.numel())] - start
            collector.offer(index, start, scores.index_fill(0, mine, NOT_ELIGIBLE))
        return True

    def _eligible(self, scores: Tensor) -> Tensor | None:
        """The scores, with -inf where they are not above the score's bound; None if one is not finite."""
        if not bool(torch.isfinite(scores).all()):
            return None
        above = self.score.above
        return scores if above is None else scores.masked_fill(scores <= above, NOT_ELIGIBLE)

    # -- in backward

    def offer(self, step: int, index: int, gradient: Tensor, rows: Tensor | None = None) -> None:
        collector, taken = self._offered(step, index)
        tensor, gradient, rows = self.scannable(index, gradient, rows)
        if not scan(collector, self.score, tensor, taken, gradient, rows):
            self._broken.append(tensor.name)

    def takes_factors(self, step: int, index: int, dy: Tensor, x: Tensor) -> bool:
        return self.products.takes(self._offered(step, index)[0], self.tensors[index], dy, x)

    def offer_factors(self, step: int, index: int, dy: Tensor, x: Tensor) -> tuple[bool, Tensor | None]:
        collector, taken = self._offered(step, index)
        return self.products.offer(collector, self.scannable(index, dy, None)[0], taken, dy, x)

    def _offered(self, step: int, index: int) -> tuple[Collector, Tensor | None]:
        """The collector of the present selection, and the entries of a tensor that it may not take."""
        if self._collector is None:
            held = [page.flat.numel() for page in self.ledger.pages]
            self._collector = self._allocated(self._counts(step) if self._in_backward else held)
        return self._collector, self._taken_at(step, index) if self._in_backward else None  # else selected ones may be

    def close(self, step: int) -> Selection | None:
        if self.report_broken(step) or self._collector is None:
            return None
        tensors, flat, gradients = self._collector.close()
        self._collector = None
        before = self.ledger.snapshot(trained=self._in_backward)
        if self._in_backward:
            slots, new = self._drop_and_grow(step, tensors, flat)
            return Selection(before, slots, gradients[new])
        self._open_window(tensors, flat, gradients)
        return Selection(before, self.ledger.free[:0], gradients[:0])

    def undo(self) -> None:
        super().undo()
        self._pending = {}
        if self._in_backward:
            self.new_entries = None
        if self._steps == 0:
            self._end_window()  # it opened in the step that was skipped, and may open again

    def commit(self, step: int, scale: float) -> None:
        if self._in_backward and self.new_entries is not None:
            self.ledger.settle()  # only now: a step that is skipped must find the weights as they were
        super().commit(step, scale)
        if not self.watching:
            return
        for index, seen in self._pending.items():
            seen = seen * scale
            self._sum[index] = self._sum[index] + seen if index in self._sum else seen
            self._square[index] = self._square[index] + seen * seen if index in self._square else seen * seen
        self._pending = {}
        self._steps += 1

    # -- the window

    def _open_window(self, tensors: Tensor, flat: Tensor, gradients: Tensor) -> None:
        """Watches these candidates, whose gradients in this pass are known."""
        self._end_window()
        self.watching = True
        for index in torch.unique(tensors).tolist():
            mine = tensors == index
            watched, order = torch.sort(flat[mine])
            self.ledger.watch(index, watched.to(self.tensors[index].form.device))
            self._pending[index] = gradients[mine][order].to(self.ledger.offsets)

    def add_watched(self, pieces: Mapping[int, Tensor]) -> None:
        for index, piece in pieces.items():
            if index in self._pending:
                self._pending[index] += piece
            elif self.ledger.pages[index].watched is not None:
                self._pending[index] = piece.clone()

    def _end_window(self) -> None:
        for index in self._watched():
            self.ledger.watch(index, None)
        self._sum, self._square, self._pending = {}, {}, {}
        self._steps, self.watching = 0, False

    def _watched(self) -> dict[int, Tensor]:
        """Flat indices (w_j,) of watched entries by tensor."""
        return {i: p.watched.flat for i, p in enumerate(self.ledger.pages) if p.watched is not None}

    # -- dropping and growing

    def _allocated(self, counts: Sequence[int]) -> Collector:
        select = self.method.select
        if not isinstance(select, Allocating):  # Method has refused it
            return select.collector(sum(counts), self.sizes, self.seed)
        return select.per_tensor(counts, self.sizes, self.seed)

    def _counts(self, step: int) -> list[int]:
        """How many entries every tensor drops and grows."""
        share = self.schedule.share(step)
        return [math.floor(share * page.flat.numel()) for page in self.ledger.pages]

    def _smallest(self, index: int, count: int) -> Tensor:
        """Positions (count,) in a tensor's page of the entries to drop, smallest first, ties by flat index."""
        page = self.ledger.pages[index]
        size = (self.ledger.offsets.detach() if self.schedule.drop == "change" else self.ledger.values())[page.slot]
        return torch.argsort(size.abs(), stable=True)[:count].to(page.flat.device)

    def _taken_at(self, step: int, index: int) -> Tensor:
        """Flat indices (ascending) of a tensor that may not grow."""
        page = self.ledger.pages[index]
        if not self.schedule.regrow:
            return page.flat
        stays = torch.ones(page.flat.shape, dtype=torch.bool, device=page.flat.device)
        stays[self._smallest(index, math.floor(self.schedule.share(step) * page.flat.numel()))] = False
        return page.flat[stays]

    def _drop_and_grow(self, step: int, tensors: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Lets the entries (tensors[k], flat[k]) grow in the place of as many of the smallest.

        One that is among the smallest itself stays, with its value and state. Returns the slots of new entries, and
        which of the given ones are new.
        """
        counts, new, watched = self._counts(step), torch.ones(flat.numel(), dtype=torch.bool), self._watched()
        for index in torch.unique(tensors).tolist():
            page, mine = self.ledger.pages[index], tensors == index
            grown = flat[mine].to(page.flat.device)
            new[mine] = torch.isin(grown, page.flat, invert=True).cpu()
            small = self._smallest(index, counts[index])
            small = small[torch.isin(page.flat[small], grown, invert=True)]
            dropped = torch.zeros(page.flat.shape, dtype=torch.bool, device=page.flat.device)
            dropped[small[: int(new[mine].sum())]] = True
            self.ledger.drop(index, dropped)
        slots = self.ledger.add(tensors[new], flat[new])
        self.clear_gradients(slots)
        self.new_entries = self._described(slots, tensors[new], flat[new], watched)
        return slots, new

    def _described(self, slots: Tensor, tensors: Tensor, flat: Tensor, watched: Mapping[int, Tensor]) -> NewEntries:
        """New entries, with the mean and mean square of their gradients if a window watched them."""
        if self._steps == 0:
            return NewEntries(slots)
        mean, square = (torch.zeros(slots.shape).to(self.ledger.offsets) for _ in range(2))
        for index in torch.unique(tensors).tolist():
            mine = tensors == index
            at = torch.searchsorted(watched[index], flat[mine].to(watched[index].device)).to(mean.device)
            mine = mine.to(mean.device)
            mean[mine], square[mine] = self._sum[index][at] / self._steps, self._square[index][at] / self._steps
        return NewEntries(slots, mean, square, self._steps)

    # -- a later process

    def state(self) -> dict[str, Any]:
        window = {"steps": self._steps, "watched": self._watched(), "sum": self._sum, "square": self._square}
        return super().state() | {"window": window, "factors": self.factors}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        window, factors = state["window"], state["factors"]
        device = self.ledger.offsets.device
        self.factors = None if factors is None else (factors[0].to(device), factors[1].to(device))
        self._end_window()
        for index, flat in window["watched"].items():
            self.ledger.watch(int(index), flat.to(self.ledger.pages[int(index)].flat.device))
        self._sum = {int(i): t.to(device, copy=True) for i, t in window["sum"].items()}
        self._square = {int(i): t.to(device, copy=True) for i, t in window["square"].items()}
        self._steps, self.watching = int(window["steps"]), bool(window["watched"])
