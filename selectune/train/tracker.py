"""The tracker follows a training run from backward pass to optimizer step, and selects in between.

A *window* is what makes one optimizer step: `accumulation_steps` backward passes, then `step()`.

    forward    offsets moved since? write the weights; weight-only selections happen here
    backward   on a selecting window every tensor's gradient is scored and dropped as it appears
    close      after the last backward of the window: select, give slots, add their gradient
    step       commit: the step counts, the weights follow the offsets

A window whose gradient is thrown away (a scaler skipped its step, zero_grad() was called within it) is undone:
support, quota and step number are as before. The selection is exact over the sum of the window's gradients.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from selectune import bits
from selectune.errors import AccumulationError
from selectune.frames import Call
from selectune.internals import after_backward, backward_id, will_reach
from selectune.method import Method
from selectune.scope import ScopedTensor
from selectune.train import ranks
from selectune.train.choose.chooser import Chooser, scattered
from selectune.train.choose.dropping import Dropping
from selectune.train.choose.growing import Afresh, Growing
from selectune.train.graph.nodes import Link
from selectune.train.graph.taps import Taps
from selectune.train.ledger import Ledger, Page
from selectune.train.own_hooks import weakly
from selectune.train.window import OtherWays, Window, scale_between
from selectune.types import DropAndGrow, Schedule

log = logging.getLogger("selectune")


class Tracker:
    """One run's state: step number, window, support. Listens to the nodes of `autograd`."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        schedule: Schedule | None,
        tensors: Sequence[ScopedTensor],
        ledger: Ledger,
        seed: int,
        accumulation_steps: int,
    ) -> None:
        self.method, self.tensors, self.ledger = method, tensors, ledger
        self.seed, self.accumulation_steps, self.step = seed, accumulation_steps, 0  # optimizer steps committed
        self.events: Counter[str] = Counter()
        if isinstance(schedule, DropAndGrow):
            kind = Dropping
        else:
            kind = Growing if schedule is None or schedule.keeps else Afresh
        self.chooser: Chooser = kind(method, schedule, tensors, ledger, seed, self.events)
        self.reached: set[int] = set()  # tensors that ever sent a gradient
        self.step_call: Call | None = None  # the running optimizer.step(), where a closure may run backward again
        self.keepalive: object = None
        self._window = Window()
        self._in_backward = False
        self._deferred = False
        self._by_hand = False  # a backward pass came without a forward of a module
        self._task = -1  # the backward pass that is going on
        self._closed_in = -1  # the last backward pass that was closed
        self._opened: tuple[int, int, bool] | None = None  # when the present graph was
        self._watched: dict[int, Tensor] = {}  # gradients of watched entries in this backward pass
        self._scale = 1.0  # what clipping and unscaling made of this window's gradient
        self._version = ledger.offsets._version
        self._written: Tensor | None = None  # the offsets as the weights got them last
        self.by_hooks: Callable[[], bool] = lambda: False  # whether an optimizer with torch's hooks holds the offsets
        ledger.offsets.register_post_accumulate_grad_hook(weakly(self.accumulated))
        self._ways = OtherWays(ledger.offsets)
        self.taps = Taps(
            model, tensors, ledger.offsets, self, self.before_forward, self.open_graph, self.recompute, self._stale
        )
        self.chooser.whole = self.taps.whole

    @property
    def quota(self) -> int:
        """How many entries the schedule still asks for at this step."""
        return self.chooser.quota(self.step)

    @property
    def in_step(self) -> bool:  # whether optimizer.step() is running
        return self.step_call is not None and not self.step_call.over()

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
            self._deferred = False
            if self._in_backward:
                self._broke_off()
            full = self._window.backwards >= self.accumulation_steps
            if full and not self.in_step and self._moved() and not self.by_hooks():
                self.commit()  # an optimizer without torch's hooks has stepped
            elif training and not self.in_step and self._thrown_away():
                self._undo()
                self.write_weights()
            elif self.ledger.offsets._version != self._version or (not training and self._swapped()):
                self.write_weights()
            if training and self._window.backwards == 0 and (inside or self._by_hand):
                self.select_ahead()
            if self._stale():
                self.taps.renew()

    def open_graph(self) -> list[tuple[Page, bool]]:
        """The pages of a new graph, and whether each tensor needs a gradient in it."""
        self._opened = self._now()
        pages = self.ledger.pages
        if self._window.before is not None:  # the step may yet be skipped: both supports get gradients
            pages = self.ledger.joined(self._window.before)
        dense = self._window.before is not None or self.chooser.passes(self.step, self.accumulation_steps) > 0
        if not any(pages[i].flat.numel() for i in self.reached):
            dense = True  # no entry is known to be reached: without a path to the loss, backward() would fail
        return [(page, dense or page.flat.numel() > 0 or page.watched is not None) for page in pages]

    def _now(self) -> tuple[int, int, bool]:
        """What the pages of a graph, and which of them need gradients, depend on."""
        return self.step, self.ledger.changes, self._window.before is None

    def _stale(self) -> bool:
        """Whether the present graph is of another step or support."""
        return self._opened != self._now()

    def recompute(self) -> None:
        """A forward is repeated inside a backward pass: with reentrant checkpointing, close after all of it."""
        if self.taps.grad_was_off and not self._deferred:
            self._deferred = True
            after_backward(self._close_deferred)

    # -- backward (Listener)

    def wants_dense(self, link: Link) -> bool:
        if not will_reach(link.split):
            return False
        self._begin()
        return self._window.reads > 0 and not self._window.closed

    def offer(self, link: Link, gradient: Tensor, rows: Tensor | None = None) -> None:
        index = link.index
        link.uses[index] -= 1
        last_use = link.uses[index] <= 0 and not self.taps.grad_was_off
        last_pass = self._window.backwards + 1 == self._window.reads
        held = self._window.held
        if last_use and last_pass and index not in held:
            self.chooser.offer(self.step, index, gradient, rows)
            return
        self._hold(index, gradient, rows)
        if last_use and last_pass:
            self.chooser.offer(self.step, index, held.pop(index))

    def watch(self, link: Link, piece: Tensor) -> None:
        index = link.index
        if not will_reach(link.split):
            return
        self._begin()
        if self.ledger.pages[index].watched is not link.page.watched:
            return  # a graph from before they were, or of a window that was undone
        piece = piece.to(self.ledger.offsets)
        self._watched[index] = self._watched[index] + piece if index in self._watched else piece

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

    def accumulated(self, offsets: Tensor) -> None:
        """Autograd added the gradient of a backward pass: what it left there is known."""
        self._window.keep_track(offsets.grad)

    def _thrown_away(self) -> bool:
        """Whether the gradient of this window's backward passes is gone: zero_grad() was called, and no step."""
        return self._window.lost(self.ledger.offsets.grad, self.ledger.selected)

    def _close(self, gradient: Tensor) -> Tensor:
        window = self._window
        window.backwards += 1
        self._in_backward, self._closed_in = False, backward_id()
        self.taps.forget()
        if window.reads > 0 and not window.closed:
            if window.backwards == window.reads:
                gradient = self._select(gradient)
            elif window.gradient is None:
                window.gradient = gradient.clone()
            else:
                window.gradient.add_(gradient)
        if self.chooser.watching:
            self.chooser.saw(self._watched)
            self._watched = {}
            grad = self.ledger.offsets.grad
            window.expected = gradient if grad is None else grad + gradient
        return gradient

    def _begin(self) -> None:
        """The first sign of a new backward pass."""
        task = backward_id()
        if self._in_backward and (task == self._task or self._deferred or self.taps.grad_was_off):
            return
        if self._in_backward:
            self._broke_off()
        window = self._window
        if task == self._closed_in and window.closed and not self.taps.grad_was_off:
            raise AccumulationError(
                "One backward pass went through forwards from before and from after another backward pass. The "
                "selection of the step closed with the first of them, so it would miss the others' gradient. Run "
                "these forwards again, or none of them before the other backward pass."
            )
        self._in_backward, self._task = True, task
        if not self.in_step and self._thrown_away():
            self._undo()
            window = self._window
        if window.backwards >= self.accumulation_steps and not self.in_step:
            grad = self.ledger.offsets.grad
            if grad is None or not bool(grad.any()):
                self._undo()
                window = self._window
            elif window.reads == self.accumulation_steps:
                raise AccumulationError(
                    f"A backward pass began before optimizer.step(), after the {window.backwards} of this step that "
                    f"attach(accumulation_steps={self.accumulation_steps}) announced. The selection of the step is "
                    "closed, so it would miss this gradient. Attach with accumulation_steps = the number of backward "
                    "passes between two optimizer steps."
                )
        if window.backwards == 0:
            version = self.ledger.changes
            self.select_ahead()  # done before forward, but where no module's ran
            self._by_hand = self._by_hand or version != self.ledger.changes
            window.reads = self.chooser.passes(self.step, self.accumulation_steps)

    def _broke_off(self) -> None:
        """A backward pass raised: what it showed is void."""
        window, self._in_backward = self._window, False
        self._watched.clear()
        self.chooser.forget()
        self.taps.forget()
        if window.backwards and self.ledger.offsets.grad is None:
            self._undo()  # the user starts the window anew
        elif window.backwards and window.reads > 0 and not window.closed:
            window.closed = True  # part of it is in the sums over the window
            self.events["broken_windows"] += 1
            log.warning(
                "Step %d: a backward pass broke off within its window, so nothing is selected; the quota waits.",
                self.step,
            )
        window.held.clear()

    @torch.no_grad()
    def settle(self) -> None:
        """A window whose passes are done is committed or undone now, if its step is known to be taken or skipped."""
        if self._in_backward or self.in_step or not 0 < self.accumulation_steps <= self._window.backwards:
            return
        grad = self.ledger.offsets.grad
        if self._moved() and not self.by_hooks():
            self.commit()
        elif grad is None or not bool(grad.any()):
            self._undo()

    def restart(self) -> None:
        """Forgets the present window and all that was kept for it: the ledger is about to be another."""
        self.chooser.forget()
        self.taps.forget()
        self._window, self._watched, self._scale, self._in_backward, self._deferred = Window(), {}, 1.0, False, False
        self._closed_in, self._opened, self._written = -1, None, None

    def _undo(self) -> None:
        """The window's step was skipped, or its gradient thrown away: nothing of it stays."""
        if self._window.before is not None:
            self.ledger.restore(self._window.before)
            self._version = self.ledger.offsets._version
        self.chooser.undo()
        self._scale = 1.0
        self._window = Window()
        self.events["skipped_steps"] += 1

    # -- selection

    @torch.no_grad()
    def prepare(self, ready: Sequence[Tensor] | None = None) -> None:
        """Ranks the whole budget beforehand, by weights or by scores that are `ready`."""
        self.chooser.prepare(ready)

    @torch.no_grad()
    def select_ahead(self) -> None:
        """Selections that read no gradient of the step: before forward, so that no dense gradient is needed."""
        if self.chooser.ahead(self.step):
            self._version = self.ledger.offsets._version

    def _select(self, gradient: Tensor) -> Tensor:
        """Closes the window's selection; returns its gradient with that of the new entries."""
        window = self._window
        for index in list(window.held):
            self.chooser.offer(self.step, index, window.held.pop(index))
        window.closed = True
        window.before = self.chooser.close(self.step, gradient)
        if window.before is not None:
            self._version = self.ledger.offsets._version
        return gradient

    def _hold(self, index: int, gradient: Tensor, rows: Tensor | None) -> None:
        held, tensor = self._window.held, self.tensors[index]
        wide = bits.wide(tensor.parameter.dtype)
        if rows is not None:
            if index in held:
                held[index].index_add_(0, rows, gradient.to(wide))
            else:
                held[index] = scattered(gradient.to(wide), rows, tensor)
        elif index in held:
            held[index].add_(gradient)
        else:
            held[index] = gradient.to(wide, copy=True)

    # -- the optimizer's step

    def before_step(self, call: Call, scale: float = 1.0) -> None:
        """The optimizer is about to step; `close_short` follows, after the closure if there is one.

        `scale`: what the optimizer itself will multiply its gradient by.
        """
        self.step_call = call
        self.taps.thread = threading.get_ident()
        ranks.refuse_many()
        expected, grad = self._window.expected, self.ledger.offsets.grad
        self._scale = self._scale if expected is None or grad is None else scale * scale_between(expected, grad)

    @torch.no_grad()
    def close_short(self) -> None:
        """No backward pass comes any more: a window that ends short (last batches of an epoch) closes here."""
        window, offsets = self._window, self.ledger.offsets
        if window.reads > 0 and not window.closed and 0 < window.backwards < self.accumulation_steps:
            if offsets.grad is None:
                offsets.grad = torch.zeros_like(offsets)
            scale = scale_between(window.gradient, offsets.grad)
            fresh = self._select(torch.zeros_like(offsets))
            offsets.grad.add_(fresh, alpha=scale)
            self.events["short_windows"] += 1

    @torch.no_grad()
    def commit(self) -> None:
        """The optimizer has stepped: the window counts, the weights follow the values."""
        self.step_call = None
        if self._window.backwards == 0 and self.tensors:
            return self.write_weights()  # momentum alone may have moved them
        self.step += 1
        self._window = Window()
        self.chooser.commit(self.step, self._scale)
        self._scale = 1.0
        self.write_weights()

    def write_weights(self) -> None:
        self.ledger.write_weights()
        self._version = self.ledger.offsets._version
        self._written = self.ledger.offsets.detach().clone()

    def _swapped(self) -> bool:
        """Whether offsets were written through `.data`, which no version tells: an average's, for an evaluation."""
        offsets, written = self.ledger.offsets.detach(), self._written
        return written is not None and (written.device != offsets.device or not torch.equal(written, offsets))

    def weights_changed(self) -> None:
        """Somebody loaded weights into the model: the offsets follow them."""
        self.ledger.follow()
        self.ledger.read_weights()
        self._version = self.ledger.offsets._version

    @property
    def current(self) -> bool:
        """Whether weights were written since the offsets moved last."""
        return self._version == self.ledger.offsets._version and not self._swapped()

    def _moved(self) -> bool:
        return self.ledger.offsets._version != self._version or not self.ledger.agrees()
