"""One optimizer step, from forward to commit: the algorithm on one screen.

    forward    `ahead`    selects where the score reads no gradient of this step
    backward   `open`     the first backward pass of the window begins
               `offer`    in a selecting step every tensor's dense gradient is scored as it appears, and dropped
               `close`    a backward pass has ended; the last one of the window selects
    select     `select`   the best entries get slots, and their gradient of this very step
    optimizer  `commit`   the optimizer has moved the offsets: the step counts, and the weights follow
               `undo`     the step was skipped: support, quota and step number are as before

A *window* is the `accumulation_steps` backward passes that make one optimizer step. The selection is exact over the
sum of the window's gradients. The tracker finds out when each of these happens, a chooser decides which entries are
selected, and the ledger keeps them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selectune import ops
from selectune.train.choose.chooser import Chooser
from selectune.train.window import Window, scale_between, scattered
from selectune.train.world import World


class Step:
    """The coming optimizer step of a run."""

    def __init__(self, chooser: Chooser, accumulation_steps: int, world: World) -> None:
        self.chooser, self.ledger, self.clock, self.world = chooser, chooser.ledger, chooser.clock, world
        self.accumulation_steps = accumulation_steps
        self.window = Window()

    # -- forward

    def ahead(self) -> bool:
        """Selects before forward if the score reads no gradient of this step; returns whether it did."""
        if not self.chooser.ahead(self.clock.step):
            return False
        self.world.compare_support()
        return True

    # -- backward

    def open(self) -> None:
        """The first backward pass of the window begins."""
        self.window.reads = self.chooser.passes(self.clock.step, self.accumulation_steps)

    def offer(self, index: int, gradient: Tensor, rows: Tensor | None, last_use: bool) -> None:
        """Takes the dense gradient of one use of a tensor, or only those of its rows that are not 0.

        The chooser gets the sum over all uses and passes of the window, once, after the last of them.
        """
        window, step = self.window, self.clock.step
        last = last_use and window.backwards + 1 == window.reads
        if index in window.kept:
            dy, x = window.together(index)
            window.add(self.ledger.tensors[index], dy.mT @ x, None)  # not by `ops`, whose memory holds the gradient
        if last and index not in window.sums and not self.world.many:
            self.chooser.offer(step, index, gradient, rows)
            return
        if index in window.sums or not last:
            window.add(self.ledger.tensors[index], gradient, rows)
            gradient, rows = window.sums[index], None
        if last:
            window.sums.pop(index, None)
            self._offer_mean(index, gradient if rows is None else scattered(gradient, rows, self.ledger.tensors[index]))

    def _offer_mean(self, index: int, gradient: Tensor) -> None:
        """Offers the mean of a dense gradient over the ranks, once all of them are here."""
        for tensor, share in self.world.offered(index, gradient):
            self._offer_share(tensor, share)

    def _offer_share(self, index: int, share: Tensor) -> None:
        """Offers the mean of the ranks' dense gradients of one tensor, which is formed where it cannot be avoided."""
        if not self.world.many or not self.chooser.offer_share(self.clock.step, index, share, self.world):
            self.chooser.offer(self.clock.step, index, self.world.mean(share))

    def offer_factors(self, index: int, dy: Tensor, x: Tensor) -> tuple[bool, Tensor | None]:
        """The only use of a tensor in this pass gives its gradient as dy^T x: whether that was enough.

        Also the dense gradient of this pass, if it was formed for it. Over several passes the sum of the gradients is
        the product of all tokens, so short passes are kept as factors.
        """
        window, step = self.window, self.clock.step
        if self.world.many:
            return False, None  # the ranks compare dense gradients
        if window.reads == 1:
            return (False, None) if index in window.sums else self.chooser.offer_factors(step, index, dy, x)
        if not (self.chooser.takes_factors(step, index, dy, x) and window.keep(index, dy, x)):
            return False, None
        if window.backwards + 1 == window.reads:
            self._offer_kept(index)
        return True, None

    def _offer_kept(self, index: int) -> None:
        dy, x = self.window.together(index)
        enough, whole = self.chooser.offer_factors(self.clock.step, index, dy, x)
        if not enough:
            self.chooser.offer(self.clock.step, index, ops.weight_gradient(dy, x) if whole is None else whole)

    def watch(self, index: int, piece: Tensor) -> None:
        """Takes the gradient of a tensor's watched entries from one of its uses."""
        watched, piece = self.window.watched, piece.to(self.ledger.offsets)
        watched[index] = watched[index] + piece if index in watched else piece

    def close(self, gradient: Tensor) -> Tensor:
        """Ends a backward pass with this gradient (B,); returns it with the gradients of new entries."""
        window = self.window
        window.backwards += 1
        if window.selects:
            if window.backwards == window.reads:
                gradient = self.select(gradient)
            else:
                window.gradient = gradient.clone() if window.gradient is None else window.gradient.add_(gradient)
        if self.chooser.watching:
            self.chooser.add_watched(self.world.watched(window.watched))
            window.watched = {}
            before = self.ledger.offsets.grad
            window.expected = self.world.mean(gradient if before is None else before + gradient)
        return gradient

    # -- select

    def select(self, gradient: Tensor) -> Tensor:
        """Changes the support, and writes the new entries' gradients of this step into `gradient` (B,)."""
        window, step = self.window, self.clock.step
        for index in list(window.kept):
            self._offer_kept(index)
        for index in list(window.sums):
            self._offer_mean(index, window.sums.pop(index))
        for index, share in self.world.rest():
            self._offer_share(index, share)
        window.closed = True
        selection = self.chooser.close(step)
        self.world.compare_support()
        if selection is not None:
            window.before = selection.before
            gradient[self.ledger.free] = 0  # the slots of dropped entries that no new entry took over
            gradient[selection.slots] = selection.gradients.to(gradient)
        return gradient

    def select_short(self) -> bool:
        """Selects on fewer passes than announced (the last batches of an epoch); returns whether it did."""
        window, offsets = self.window, self.ledger.offsets
        if not (window.selects and 0 < window.backwards < self.accumulation_steps):
            return False
        if offsets.grad is None:
            offsets.grad = torch.zeros_like(offsets)
        then = None if window.gradient is None else self.world.mean(window.gradient)
        scale = scale_between(then, offsets.grad)  # the gradient may have been clipped since
        offsets.grad.add_(self.select(torch.zeros_like(offsets)), alpha=scale)
        return True

    # -- optimizer

    def commit(self) -> None:
        """The optimizer has stepped: the window counts."""
        self.clock.step += 1
        window, self.window = self.window, Window()
        self.chooser.commit(self.clock.step, window.scale)
        self.ledger.write_weights()

    def undo(self) -> None:
        """The step was skipped, or its gradient was thrown away: nothing of the window remains."""
        if self.window.before is not None:
            self.ledger.restore(self.window.before)
        self.window = Window()
        self.chooser.undo()
