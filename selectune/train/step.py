"""One optimizer step, from forward to commit: the algorithm on one screen.

    forward    `ahead`    selections that read no gradient of this step
    backward   `offer`    on a selecting step every tensor's dense gradient is scored and dropped as it appears
               `close`    a backward pass has ended; the last of the window selects
    select     `select`   the best entries get slots, and their gradient of this very step
    optimizer  `commit`   the offsets have moved: the step counts, and the weights follow
               `undo`     the step was skipped: support, quota and step number are as before

A *window* is what makes one optimizer step: `accumulation_steps` backward passes, then `step()`. The selection is
exact over the sum of the window's gradients. The tracker finds out when each of these happens, a chooser decides which
entries are selected, and the ledger keeps them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selectune.train.choose.chooser import Chooser
from selectune.train.window import Window, scale_between


class Step:
    """The coming optimizer step of a run."""

    def __init__(self, chooser: Chooser, accumulation_steps: int) -> None:
        self.chooser, self.ledger, self.clock = chooser, chooser.ledger, chooser.clock
        self.accumulation_steps = accumulation_steps
        self.window = Window()

    # -- forward

    def ahead(self) -> bool:
        """Selects before forward, where the score reads no gradient of this step; whether it did."""
        return self.chooser.ahead(self.clock.step)

    # -- backward

    def open(self) -> None:
        """The first backward pass of the window begins."""
        self.window.reads = self.chooser.passes(self.clock.step, self.accumulation_steps)

    def offer(self, index: int, gradient: Tensor, rows: Tensor | None, last_use: bool) -> None:
        """One use of a tensor gives its dense gradient, or the rows of it that are not 0.

        The chooser is shown the sum over the uses and passes of the window, once, after the last of them.
        """
        window, step = self.window, self.clock.step
        last = last_use and window.backwards + 1 == window.reads
        if last and index not in window.held:
            self.chooser.offer(step, index, gradient, rows)
            return
        window.hold(self.ledger.tensors[index], gradient, rows)
        if last:
            self.chooser.offer(step, index, window.held.pop(index))

    def watch(self, index: int, piece: Tensor) -> None:
        """The gradient of a tensor's watched entries, from one of its uses."""
        seen, piece = self.window.watched, piece.to(self.ledger.offsets)
        seen[index] = seen[index] + piece if index in seen else piece

    def close(self, gradient: Tensor) -> Tensor:
        """A backward pass has ended and gives this gradient (B,); returns it with that of new entries."""
        window = self.window
        window.backwards += 1
        if window.selects:
            if window.backwards == window.reads:
                gradient = self.select(gradient)
            else:
                window.gradient = gradient.clone() if window.gradient is None else window.gradient.add_(gradient)
        if self.chooser.watching:
            self.chooser.saw(window.watched)
            window.watched = {}
            before = self.ledger.offsets.grad
            window.expected = gradient if before is None else before + gradient
        return gradient

    # -- select

    def select(self, gradient: Tensor) -> Tensor:
        """Changes the support; returns the window's gradient with that of the new entries."""
        window, step = self.window, self.clock.step
        for index in list(window.held):
            self.chooser.offer(step, index, window.held.pop(index))
        window.closed = True
        window.before = self.chooser.close(step, gradient)
        return gradient

    def select_short(self) -> bool:
        """Selects on fewer passes than announced, as the last batches of an epoch may give; whether it did."""
        window, offsets = self.window, self.ledger.offsets
        if not (window.selects and 0 < window.backwards < self.accumulation_steps):
            return False
        if offsets.grad is None:
            offsets.grad = torch.zeros_like(offsets)
        scale = scale_between(window.gradient, offsets.grad)  # clipping has been
        offsets.grad.add_(self.select(torch.zeros_like(offsets)), alpha=scale)
        return True

    # -- optimizer

    def commit(self) -> None:
        """The optimizer has stepped."""
        self.clock.step += 1
        window, self.window = self.window, Window()
        self.chooser.commit(self.clock.step, window.scale)
        self.ledger.write_weights()

    def undo(self) -> None:
        """The step was skipped, or its gradient thrown away: nothing of the window stays."""
        if self.window.before is not None:
            self.ledger.restore(self.window.before)
        self.window = Window()
        self.chooser.undo()
