"""The tracker finds out when things happen: it follows a run from forward to backward to optimizer step.

What happens then is in `step`. Forwards and backward passes are told by the graph (`graph.taps`), steps by torch's
hooks (`step_hooks`) or, for an optimizer without them, by the vector having moved.

A window whose gradient is thrown away (a scaler skipped its step, zero_grad() was called within it) is undone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from selectune.errors import AccumulationError, TunerError
from selectune.frames import Call
from selectune.internals import after_backward, backward_id, will_reach
from selectune.train import ranks
from selectune.train.choose.chooser import Chooser
from selectune.train.graph.nodes import Link
from selectune.train.graph.own_hooks import weakly
from selectune.train.graph.taps import Taps
from selectune.train.ledger import Page
from selectune.train.optim.holders import Holders
from selectune.train.step import Step
from selectune.train.window import OtherWays, Window, scale_between

log = logging.getLogger("selectune")


class Tracker:
    """Follows the passes of one run (`taps.Follower`), and has its steps done."""

    def __init__(self, model: nn.Module, chooser: Chooser, accumulation_steps: int) -> None:
        self.chooser, self.ledger, self.tensors = chooser, chooser.ledger, chooser.tensors
        self.clock, self.events, self.accumulation_steps = chooser.clock, chooser.events, accumulation_steps
        self.coming = Step(chooser, accumulation_steps)
        self.reached: set[int] = set()  # tensors that ever sent a gradient
        self.keepalive: object = None  # what must live as long as the model is followed
        self._in_backward = False
        self._deferred = False  # the close waits for the end of a backward pass that consists of many
        self._by_hand = False  # a backward pass came without a forward of a module
        self._task = -1  # the backward pass that is going on
        self._closed_in = -1  # the last backward pass that was closed
        self._opened: tuple[int, int, bool] | None = None  # when the present graph was
        offsets = self.ledger.offsets
        self._version = offsets._version
        self._written: Tensor | None = None  # the offsets as the weights got them last
        self.holders = Holders(offsets)
        offsets.register_post_accumulate_grad_hook(weakly(self.accumulated))
        self._ways = OtherWays(offsets)
        self.taps = Taps(model, self.tensors, offsets, self, chooser.beyond_rows)
        self.turn()

    @property
    def step(self) -> int:
        """Optimizer steps committed."""
        return self.clock.step

    @property
    def quota(self) -> int:
        """How many entries the schedule still asks for at this step."""
        return self.chooser.quota(self.step)

    @property
    def in_step(self) -> bool:
        """Whether optimizer.step() is running."""
        return self.clock.in_step

    @property
    def window(self) -> Window:
        """The present step's window."""
        return self.coming.window

    # -- forward

    def before_forward(self, inside: bool = True) -> None:
        """Brings weights and support up to date before the outermost module runs, or before a use outside of any.

        A use outside may be a look, which shall change nothing; so selections of the coming step wait, unless it has
        been seen that the model is trained like that.
        """
        training = torch.is_grad_enabled()
        with torch.no_grad():
            ranks.refuse_many()
            self.ledger.follow()
            if self.chooser.dense:
                return self.chooser.refresh()
            self._deferred = False
            if self._in_backward:
                self._broke_off()
            full = self.window.backwards >= self.accumulation_steps
            if full and not self.in_step and self._moved() and not self.holders.any():
                self.commit()  # an optimizer without torch's hooks has stepped
            elif training and not self.in_step and self._thrown_away():
                self._undo()
                self.write_weights()
            elif self.ledger.offsets._version != self._version or (not training and self._swapped()):
                self.write_weights()
            if training and self.window.backwards == 0 and (inside or self._by_hand):
                self.select_ahead()
            if self.stale():
                self.taps.renew()

    def pages(self) -> list[tuple[Page, bool]]:
        """The pages of a new graph, and whether each tensor needs a gradient in it."""
        self._opened, before = self._now(), self.window.before
        # the step of a selection may yet be skipped: then both supports get gradients
        pages = self.ledger.pages if before is None else self.ledger.joined(before)
        dense = before is not None or self.chooser.passes(self.step, self.accumulation_steps) > 0
        if not any(pages[i].flat.numel() for i in self.reached):
            dense = True  # no entry is known to be reached: without a path to the loss, backward() would fail
        return [(page, dense or page.flat.numel() > 0 or page.watched is not None) for page in pages]

    def _now(self) -> tuple[int, int, bool]:
        """What the pages of a graph, and which of them need gradients, depend on."""
        return self.step, self.ledger.changes, self.window.before is None

    def stale(self) -> bool:
        """Whether the present graph is of another step or support."""
        return self._opened != self._now()

    def recompute(self) -> None:
        """A forward is repeated inside a backward pass: with reentrant checkpointing, close after all of it."""
        if self.taps.grad_was_off and not self._deferred:
            self._deferred = True
            after_backward(self._close_deferred)

    @torch.no_grad()
    def select_ahead(self) -> None:
        """Selections that read no gradient of the step: before forward, so that no dense gradient is needed."""
        with self.taps.resting():
            if self.coming.ahead():
                self._version = self.ledger.offsets._version

    @torch.no_grad()
    def prepare(self, ready: Sequence[Tensor] | None = None) -> None:
        """Ranks the whole budget beforehand, by weights or by scores that are `ready`."""
        self.chooser.prepare(ready)

    # -- backward (Listener)

    def wants_dense(self, link: Link) -> bool:
        if not will_reach(link.split):
            return False
        self._begin()
        return self.window.selects

    def offer(self, link: Link, gradient: Tensor, rows: Tensor | None = None) -> None:
        link.uses[link.index] -= 1
        self.coming.offer(link.index, gradient, rows, link.uses[link.index] <= 0 and not self.taps.grad_was_off)

    def watch(self, link: Link, piece: Tensor) -> None:
        if not will_reach(link.split):
            return
        self._begin()
        if self.ledger.pages[link.index].watched is link.page.watched:
            self.coming.watch(link.index, piece)
        # else it is a graph from before they were watched, or of a window that was undone

    def close(self, pages: Sequence[Page], pieces: Sequence[Tensor | None]) -> Tensor:
        self._begin()
        self.reached.update(i for i, piece in enumerate(pieces) if piece is not None)
        gradient = self.ledger.gather(pages, pieces)
        gradient[self.ledger.free] = 0  # slots of a selection that was undone after this graph was built
        if self.taps.grad_was_off:
            self.recompute()
            return self._ways.sends(gradient)
        return self._ways.sends(self._close(gradient))

    def _close_deferred(self) -> None:
        self._deferred = False
        offsets = self.ledger.offsets
        if offsets.grad is None:
            offsets.grad = torch.zeros_like(offsets)
        offsets.grad.add_(self._close(torch.zeros_like(offsets)))
        self.accumulated(offsets)

    def _close(self, gradient: Tensor) -> Tensor:
        selects = self.window.selects
        self._in_backward, self._closed_in = False, backward_id()
        self.taps.forget()
        gradient = self.coming.close(gradient)
        if selects and self.window.before is not None:
            self._version = self.ledger.offsets._version
        return gradient

    def accumulated(self, offsets: Tensor) -> None:
        """Autograd added the gradient of a backward pass: what it left there is known."""
        self.window.keep_track(offsets.grad)

    def _thrown_away(self) -> bool:
        """Whether the gradient of this window's backward passes is gone: zero_grad() was called, and no step."""
        return self.window.lost(self.ledger.offsets.grad, self.ledger.selected)

    def _begin(self) -> None:
        """The first sign of a new backward pass."""
        task = backward_id()
        if self._in_backward and (task == self._task or self._deferred or self.taps.grad_was_off):
            return
        if self._in_backward:
            self._broke_off()
        if task == self._closed_in and self.window.closed and not self.taps.grad_was_off:
            raise AccumulationError(
                "One backward pass went through forwards from before and from after another backward pass. The "
                "selection of the step closed with the first of them, so it would miss the others' gradient. Run "
                "these forwards again, or none of them before the other backward pass."
            )
        self._in_backward, self._task = True, task
        if not self.in_step and self._thrown_away():
            self._undo()
        if self.window.backwards >= self.accumulation_steps and not self.in_step:
            grad = self.ledger.offsets.grad
            if grad is None or not bool(grad.any()):
                self._undo()
            elif self.window.reads == self.accumulation_steps:
                raise AccumulationError(
                    f"A backward pass began before optimizer.step(), after the {self.window.backwards} of this step "
                    f"that attach(accumulation_steps={self.accumulation_steps}) announced. The selection of the step "
                    "is closed, so it would miss this gradient. Attach with accumulation_steps = the number of "
                    "backward passes between two optimizer steps."
                )
        if self.window.backwards == 0:
            version = self.ledger.changes
            self.select_ahead()  # done before forward, but where no module's ran
            self._by_hand = self._by_hand or version != self.ledger.changes
            self.coming.open()

    def _broke_off(self) -> None:
        """A backward pass raised: what it showed is void."""
        window, self._in_backward = self.window, False
        window.watched.clear()
        self.chooser.forget()
        self.taps.forget()
        if window.backwards and self.ledger.offsets.grad is None:
            self._undo()  # the user starts the window anew
        elif window.backwards and window.selects:
            window.closed = True  # part of it is in the sums over the window
            self.events["broken_windows"] += 1
            log.warning(
                "Step %d: a backward pass broke off within its window, so nothing is selected; the quota waits.",
                self.step,
            )
        window.held.clear()

    # -- the optimizer's step

    def before_step(self, call: Call, scale: float = 1.0) -> None:
        """The optimizer is about to step; `close_short` follows, after the closure if there is one.

        `scale`: what the optimizer itself will multiply its gradient by.
        """
        self.clock.call = call
        self.taps.trains_in_this_thread()
        ranks.refuse_many()
        expected, grad = self.window.expected, self.ledger.offsets.grad
        if expected is not None and grad is not None:
            self.window.scale = scale * scale_between(expected, grad)

    @torch.no_grad()
    def close_short(self) -> None:
        """No backward pass comes any more: a window that ends short (last batches of an epoch) closes here."""
        if self.coming.select_short():
            self.events["short_windows"] += 1
            if self.window.before is not None:
                self._version = self.ledger.offsets._version

    @torch.no_grad()
    def commit(self) -> None:
        """The optimizer has stepped: the window counts, the weights follow the offsets."""
        self.clock.call = None
        if self.window.backwards == 0 and self.tensors:
            return self.write_weights()  # momentum alone may have moved them
        self.coming.commit()
        self._seen()
        self.turn()

    @torch.no_grad()
    def commit_dense(self) -> None:
        """The optimizer has stepped in a dense phase."""
        self.clock.step += 1
        self.turn()
        if self.chooser.dense:
            self.chooser.refresh()

    def turn(self) -> None:
        """A dense phase begins or ends, if it is time."""
        if self.chooser.turn():
            self.follow_phase()

    def follow_phase(self) -> None:
        """In a dense phase weights are trained as torch does it; in any other they follow the offsets."""
        self.taps.asleep = self.chooser.dense
        self.taps.forget()
        if not self.chooser.dense:
            self.write_weights()

    @torch.no_grad()
    def settle(self) -> None:
        """A window whose passes are done is committed or undone now, if its step is known to be taken or skipped."""
        if self._in_backward or self.in_step or not 0 < self.accumulation_steps <= self.window.backwards:
            return
        grad = self.ledger.offsets.grad
        if self._moved() and not self.holders.any():
            self.commit()
        elif grad is None or not bool(grad.any()):
            self._undo()

    def between_steps(self) -> None:
        """Settles what can be; raises TunerError within a step."""
        self.settle()
        if self.window.backwards or self._in_backward or self.in_step:
            raise TunerError(
                f"The state of a run is taken between steps; this one is in step {self.step}, after "
                f"{self.window.backwards} of {self.accumulation_steps} backward passes. Call state_dict() after "
                "optimizer.step()."
            )

    def load_state(self, step: int, reached: Sequence[int], events: Mapping[str, int]) -> None:
        """Goes on from another step."""
        self.clock.step, self.reached = step, set(reached)
        self.events.clear()
        self.events.update(events)

    def restart(self) -> None:
        """Forgets the present window and all that was kept for it: the ledger is about to be another."""
        self.chooser.forget()
        self.taps.forget()
        self.coming.window, self._in_backward, self._deferred = Window(), False, False
        self._closed_in, self._opened, self._written = -1, None, None

    def _undo(self) -> None:
        """The window's step was skipped, or its gradient thrown away: nothing of it stays."""
        selected = self.window.before is not None
        self.coming.undo()
        if selected:
            self._version = self.ledger.offsets._version
        self.events["skipped_steps"] += 1

    # -- offsets and weights

    def write_weights(self) -> None:
        """The weights are start + offset from here on."""
        self.ledger.write_weights()
        self._seen()

    def _seen(self) -> None:
        """The weights are those of the present offsets."""
        self._version = self.ledger.offsets._version
        self._written = self.ledger.offsets.detach().clone()

    def weights_changed(self) -> None:
        """Somebody loaded weights into the model: what is trained follows them."""
        if self.chooser.dense:
            return self.chooser.weights_changed()
        self.ledger.follow()
        self.ledger.read_weights()
        self._version = self.ledger.offsets._version

    def _swapped(self) -> bool:
        """Whether offsets were written through `.data`, which no version tells: an average's, for an evaluation."""
        offsets, written = self.ledger.offsets.detach(), self._written
        return written is not None and (written.device != offsets.device or not torch.equal(written, offsets))

    @property
    def current(self) -> bool:
        """Whether weights were written since the offsets moved last."""
        return self._version == self.ledger.offsets._version and not self._swapped()

    def _moved(self) -> bool:
        return self.ledger.offsets._version != self._version or not self.ledger.agrees()
