"""The tracker finds out when things happen: it follows a run from forward to backward to optimizer step.

What happens then is in `step`. The graph (`graph.taps`) reports forwards and backward passes, torch's hooks
(`step_hooks`) report optimizer steps; a step of an optimizer without hooks is noticed because the offsets have moved.

A window whose gradient is thrown away (a scaler skipped its step, or zero_grad() was called within it) is undone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from selectune.errors import AccumulationError, TunerError
from selectune.frames import Call
from selectune.internals import after_backward, backward_id, will_reach
from selectune.train.choose.chooser import Chooser
from selectune.train.graph.nodes import Link
from selectune.train.graph.own_hooks import weakly
from selectune.train.graph.taps import Taps
from selectune.train.optim.holders import Holders
from selectune.train.step import Step
from selectune.train.support.pages import Page
from selectune.train.window import PenaltyWatch, Window, scale_between
from selectune.train.world import World

log = logging.getLogger("selectune")


class Tracker:
    """Follows the passes of one run (`taps.Follower`), and calls its steps."""

    def __init__(self, model: nn.Module, chooser: Chooser, accumulation_steps: int, world: World) -> None:
        self.chooser, self.ledger, self.tensors = chooser, chooser.ledger, chooser.tensors
        self.clock, self.events, self.accumulation_steps = chooser.clock, chooser.events, accumulation_steps
        self.world = world
        self.sparse = not chooser.method.structure.plain  # whole units are chosen by what no backward pass tells
        self.coming = Step(chooser, accumulation_steps, world)
        self.reached: set[int] = set()  # tensors that ever sent a gradient
        self.keepalive: object = None  # lives as long as the model is followed
        self.away = False  # the trained values are off the model for a while (`aside`)
        self._in_backward = False
        self._deferred = False  # the window closes when a backward pass that contains others has ended
        self._by_hand = False  # a backward pass came without a module's forward
        self._task = -1  # number of the backward pass that is running
        self._closed_in = -1  # number of the last backward pass that was closed
        self._opened: tuple[int, int, bool] | None = None  # what the present graph was made for
        offsets = self.ledger.offsets
        self._version = offsets._version  # of the offsets that the weights follow
        self._written: Tensor | None = None  # a copy of these offsets
        self.holders = Holders(offsets)
        offsets.register_post_accumulate_grad_hook(weakly(self.accumulated))
        self._penalties = PenaltyWatch(offsets)
        self.taps = Taps(model, self.tensors, offsets, self, chooser.beyond_rows)
        self.switch_phase()

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

        A use outside of modules may only look at a weight and must change nothing. So selections of the coming step
        wait then, unless the model was seen to be trained that way.
        """
        if self.away:
            return None
        training = torch.is_grad_enabled()
        with torch.no_grad():
            self.world.meet()
            self.world.inside()
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

    @torch.no_grad()
    def select_ahead(self) -> None:
        """Selects before forward where the score reads no gradient of the step, so that no dense one is formed."""
        with self.taps.resting():
            if self.coming.ahead():
                self._version = self.ledger.offsets._version

    def pages(self) -> list[tuple[Page, bool]]:
        """The pages of a new graph, and whether each tensor needs a gradient in it."""
        self._opened, before = self._now(), self.window.before
        # the step of a selection may still be skipped: then both supports need gradients
        pages = self.ledger.pages if before is None else self.ledger.joined(before)
        dense = before is not None or self.chooser.passes(self.step, self.accumulation_steps) > 0
        if not any(pages[i].flat.numel() for i in self.reached):
            dense = True  # no selected entry is known to be reached, and backward() needs some path from the loss
        return [(page, dense or page.flat.numel() > 0 or page.watched is not None) for page in pages]

    def _now(self) -> tuple[int, int, bool]:
        """What a graph's pages, and which of them need gradients, depend on."""
        return self.step, self.ledger.changes, self.window.before is None

    def stale(self) -> bool:
        """Whether the present graph was made for another step or support."""
        return self._opened != self._now()

    def recompute(self) -> None:
        """A forward is repeated inside a backward pass: reentrant checkpointing, whose outer pass ends it."""
        if self.taps.grad_was_off and not self._deferred:
            self._deferred = True
            after_backward(self._close_deferred)

    # -- backward (Listener)

    def wants_dense(self, link: Link) -> bool:
        if not will_reach(link.split):
            return False
        self._begin()
        return self.window.selects

    def offer(self, link: Link, gradient: Tensor, rows: Tensor | None = None) -> None:
        link.uses[link.index] -= 1
        self.coming.offer(link.index, gradient, rows, link.uses[link.index] <= 0 and not self.taps.grad_was_off)

    def offer_factors(self, link: Link, dy: Tensor, x: Tensor) -> tuple[bool, Tensor | None]:
        if link.uses[link.index] != 1 or self.taps.grad_was_off:
            return False, None  # the sum over several uses is wanted
        enough, whole = self.coming.offer_factors(link.index, dy, x)
        if enough:
            link.uses[link.index] = 0
        return enough, whole

    def watch(self, link: Link, piece: Tensor) -> None:
        if not will_reach(link.split):
            return
        self._begin()
        if self.ledger.pages[link.index].watched is link.page.watched:
            self.coming.watch(link.index, piece)
        # else the graph is older than the watch, or of a window that was undone

    def close(self, pages: Sequence[Page], pieces: Sequence[Tensor | None]) -> Tensor:
        self._begin()
        self.reached.update(i for i, piece in enumerate(pieces) if piece is not None)
        gradient = self.ledger.gather(pages, pieces)
        gradient[self.ledger.free] = 0  # slots of a selection that was undone after this graph was made
        if self.taps.grad_was_off:
            self.recompute()
            return self._penalties.sends(gradient)
        return self._penalties.sends(self._close(gradient))

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
            if self._no_gradient():
                self._undo()
            elif self.window.reads == self.accumulation_steps:
                raise AccumulationError(
                    f"A backward pass began before optimizer.step(), after the {self.window.backwards} of this step "
                    f"that attach(accumulation_steps={self.accumulation_steps}) announced. The selection of the step "
                    "is closed, so it would miss this gradient. Attach with accumulation_steps = the number of "
                    "backward passes between two optimizer steps."
                )
        if self.window.backwards == 0:
            changes = self.ledger.changes
            self.select_ahead()  # done already unless no module's forward ran
            self._by_hand = self._by_hand or changes != self.ledger.changes
            self.coming.open()

    def _close(self, gradient: Tensor) -> Tensor:
        """Ends a backward pass."""
        selects = self.window.selects
        self._in_backward, self._closed_in = False, backward_id()
        self.taps.forget()
        gradient = self.coming.close(gradient)
        if selects and self.window.before is not None:
            self._version = self.ledger.offsets._version
        return gradient

    def _close_deferred(self) -> None:
        """Ends a backward pass that contains others: reentrant checkpointing."""
        self._deferred = False
        offsets = self.ledger.offsets
        if offsets.grad is None:
            offsets.grad = torch.zeros_like(offsets)
        offsets.grad.add_(self._close(torch.zeros_like(offsets)))
        self.accumulated(offsets)

    def accumulated(self, offsets: Tensor) -> None:
        """Autograd has added the gradient of a backward pass."""
        if not self._deferred:
            self.world.average(offsets)
            self.world.average_later(offsets)
        self.window.keep_track(offsets.grad)

    def _broke_off(self) -> None:
        """A backward pass raised: what it offered is void."""
        window, self._in_backward = self.window, False
        window.watched.clear()
        self.chooser.forget()
        self.world.forget()
        self.taps.forget()
        if window.backwards and self.ledger.offsets.grad is None:
            self._undo()  # the user starts the window again
        elif window.backwards and window.selects:
            window.closed = True  # its sums contain a part of the broken pass
            self.events["broken_windows"] += 1
            log.warning(
                "Step %d: a backward pass broke off within its window, so nothing is selected; the quota waits.",
                self.step,
            )
        window.sums.clear()
        window.kept.clear()

    # -- the optimizer's step

    def before_step(self, call: Call, scale: float = 1.0) -> None:
        """The optimizer is about to step; `close_short` follows, after the closure if there is one.

        `scale`: the factor by which the optimizer itself will multiply its gradient.
        """
        self.clock.call = call
        self.taps.trains_in_this_thread()
        self.world.meet()
        self.world.before_step(self.step)
        expected, grad = self.window.expected, self.ledger.offsets.grad
        if expected is not None and grad is not None:
            self.window.scale = scale * scale_between(expected, grad)

    @torch.no_grad()
    def close_short(self) -> None:
        """No backward pass will follow: a window with too few (the last batches of an epoch) closes here."""
        if self.coming.select_short():
            self.events["short_windows"] += 1
            if self.window.before is not None:
                self._version = self.ledger.offsets._version

    @torch.no_grad()
    def commit(self) -> None:
        """The optimizer has stepped."""
        self.clock.call = None
        if self.window.backwards == 0 and self.tensors:
            return self.write_weights()  # momentum alone may have moved the offsets
        self.coming.commit()
        self._mark_written()
        self.switch_phase()

    @torch.no_grad()
    def commit_dense(self) -> None:
        """The optimizer has stepped in a dense phase."""
        self.clock.step += 1
        self.switch_phase()
        if self.chooser.dense:
            self.chooser.write_weights()  # whatever versions say: torch's fused optimizers do not count theirs

    def _undo(self) -> None:
        """The window's step was skipped, or its gradient was thrown away."""
        selected = self.window.before is not None
        self.coming.undo()
        if selected:
            self._version = self.ledger.offsets._version
        self.events["skipped_steps"] += 1

    def _thrown_away(self) -> bool:
        """Whether the gradient of this window is gone: zero_grad() was called, and no step was taken."""
        return self.window.lost(self.ledger.offsets.grad, self.ledger.selected)

    def _no_gradient(self) -> bool:
        """Whether the optimizer would find no gradient, or only zeros."""
        grad = self.ledger.offsets.grad
        return grad is None or not bool(grad.any())

    # -- dense phases

    def switch_phase(self) -> None:
        """Begins or ends a dense phase if it is time."""
        if self.chooser.switch_phase():
            self.follow_phase()

    def follow_phase(self) -> None:
        """In a dense phase torch trains the weights as ever; otherwise they follow the offsets."""
        self.taps.asleep = self.chooser.dense
        self.taps.forget()
        if not self.chooser.dense:
            self.write_weights()

    # -- the state of a run

    @torch.no_grad()
    def settle(self) -> None:
        """Commits or undoes a window whose passes are done, if its step is known to be taken or skipped."""
        if self._in_backward or self.in_step or not 0 < self.accumulation_steps <= self.window.backwards:
            return
        if self._moved() and not self.holders.any():
            self.commit()
        elif self._no_gradient():
            self._undo()

    def between_steps(self) -> None:
        """Settles the window if possible; raises TunerError within a step."""
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
        """Forgets the present window and graph: the ledger is about to be replaced."""
        self.chooser.forget()
        self.world.forget()
        self.taps.forget()
        self.coming.window, self._in_backward, self._deferred = Window(), False, False
        self._closed_in, self._opened, self._written = -1, None, None

    # -- offsets and weights

    def write_weights(self) -> None:
        """Sets the weights to start + offset."""
        self.ledger.write_weights()
        self._mark_written()

    def _mark_written(self) -> None:
        self._version = self.ledger.offsets._version
        self._written = self.ledger.offsets.detach().clone()

    def weights_changed(self) -> None:
        """Somebody loaded weights into the model: the offsets (or the latents) follow them."""
        if self.chooser.dense:
            return self.chooser.weights_changed()
        self.ledger.follow()
        self.ledger.read_weights()
        self._version = self.ledger.offsets._version

    def _swapped(self) -> bool:
        """Whether offsets were written through `.data`, which changes no version: an average's, for an evaluation."""
        offsets, written = self.ledger.offsets.detach(), self._written
        return written is not None and (written.device != offsets.device or not torch.equal(written, offsets))

    @property
    def current(self) -> bool:
        """Whether the weights follow the present offsets."""
        return self._version == self.ledger.offsets._version and not self._swapped()

    def _moved(self) -> bool:
        return self.ledger.offsets._version != self._version or bool(self.ledger.strays())
