"""The tracker follows a training run from backward pass to optimizer step, and selects in between.

A *window* is what makes one optimizer step: `accumulation_steps` backward passes, then `step()`.

    forward    values moved since? write them into the weights; weight-only selections happen here
    backward   on a selecting window every tensor's gradient is scored and dropped as it appears
    close      after the last backward of the window: select, give slots, add their gradient
    step       commit: the step counts, the values are written into the weights

A window whose step never comes (a gradient scaler skipped it) is undone: support, quota and step
number are as before. The selection is exact over the sum of the window's gradients.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selectune.errors import AccumulationError
from selectune.method import Method
from selectune.scope import ScopedTensor
from selectune.train.autograd import Link
from selectune.train.calls import Call
from selectune.train.chooser import Afresh, Chooser, Growing, scattered
from selectune.train.exchange import Exchange
from selectune.train.ledger import Ledger, Page, Snapshot
from selectune.train.taps import Taps
from selectune.types import Exchanging, Schedule

log = logging.getLogger("selectune")


@dataclass
class Window:
    """What is known of the present step, from its first backward pass to its commit."""

    backwards: int = 0
    reads: int = 0  # backward passes, from the first on, whose dense gradients are wanted
    closed: bool = False  # the selection of this window is done
    held: dict[int, Tensor] = field(default_factory=dict)  # dense sums, while more is to come for them
    before: Snapshot | None = None  # the ledger before this window's selection
    gradient: Tensor | None = None  # (B,) what the window gave so far, kept under accumulation only
    expected: Tensor | None = None  # (B,) what the optimizer will find, unless it is scaled; kept while watching


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
        self.seed, self.accumulation_steps = seed, accumulation_steps
        self.step = 0  # optimizer steps committed
        self.events: Counter[str] = Counter()
        if isinstance(schedule, Exchanging):
            kind = Exchange
        else:
            kind = Growing if schedule is None or schedule.keeps else Afresh
        self.chooser: Chooser = kind(method, schedule, tensors, ledger, seed, self.events)
        self.reached: set[int] = set()  # tensors that ever sent a gradient
        self.step_call: Call | None = None  # the running optimizer.step(), where a closure may run backward again
        self.keepalive: object = None
        self._window = Window()
        self._in_backward = False
        self._deferred = False
        self._task = -1  # the backward pass that is going on
        self._closed_in = -1  # the last backward pass that was closed
        self._opened: tuple[int, int, bool] | None = None  # when the present graph was
        self._watched: dict[int, Tensor] = {}  # gradients of watched entries in this backward pass
        self._scale = 1.0  # what clipping and unscaling made of this window's gradient
        self._version = ledger.values._version
        self._written: Tensor | None = None  # the values as the weights got them last
        self.taps = Taps(model, tensors, ledger.values, self, self.before_forward, self.open_graph, self.recompute)

    @property
    def schedule(self) -> Schedule | None:
        """When the chooser chooses, and how many."""
        return self.chooser.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule | None) -> None:
        self.chooser.schedule = schedule

    @property
    def quota(self) -> int:
        """How many entries the schedule still asks for at this step."""
        return self.chooser.quota(self.step)

    @property
    def in_step(self) -> bool:
        """Whether optimizer.step() is running."""
        return self.step_call is not None and not self.step_call.over()

    # -- forward

    def before_forward(self) -> None:
        """Brings weights and support up to date before the outermost module runs."""
        self.ledger.follow()
        self._deferred = False
        if self._in_backward:
            self._broke_off()
        if self._window.backwards >= self.accumulation_steps and not self.in_step and self._moved():
            self.commit()  # an optimizer without torch's hooks has stepped
        elif self.ledger.values._version != self._version or (not torch.is_grad_enabled() and self._swapped()):
            self.write_weights()
        if torch.is_grad_enabled() and self._window.backwards == 0:
            self.select_ahead()
        if self._opened != self._now():  # a graph that never saw its backward pass, of another step or support
            self.taps.forget()

    def open_graph(self) -> list[tuple[Page, bool]]:
        """The pages of a new graph, and whether each tensor needs a gradient in it."""
        self._opened = self._now()
        pages = self.ledger.pages
        if self._window.before is not None:  # the step may yet turn out to be skipped: both supports get gradients
            pages = self.ledger.joined(self._window.before)
        dense = self._window.before is not None or self.chooser.passes(self.step, self.accumulation_steps) > 0
        if not any(pages[i].flat.numel() for i in self.reached):
            dense = True  # no entry is known to be reached: without a path to the loss, backward() would fail
        return [(page, dense or page.flat.numel() > 0 or page.watched is not None) for page in pages]

    def _now(self) -> tuple[int, int, bool]:
        """What the pages of a graph, and which of them need gradients, depend on."""
        return self.step, self.ledger.changes, self._window.before is None

    def recompute(self) -> None:
        """A forward is repeated inside a backward pass: with reentrant checkpointing, close after all of it."""
        if self.taps.grad_was_off and not self._deferred:
            self._deferred = True
            torch.autograd.Variable._execution_engine.queue_callback(self._close_deferred)

    # -- backward (Listener)

    def wants_dense(self, link: Link) -> bool:
        if not _reaches(link.split):
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
        if not _reaches(link.split):
            return
        self._begin()
        if self.ledger.pages[index].watched is not link.page.watched:
            return  # a graph from before they were, or of a window that was undone
        piece = piece.to(self.ledger.values)
        self._watched[index] = self._watched[index] + piece if index in self._watched else piece

    def close(self, pages: Sequence[Page], pieces: Sequence[Tensor | None]) -> Tensor:
        self._begin()
        self.reached.update(i for i, piece in enumerate(pieces) if piece is not None)
        gradient = self.ledger.gather(pages, pieces)
        gradient[self.ledger.free] = 0  # slots of a selection that was undone after this graph was built
        if self.taps.grad_was_off:
            self.recompute()
            return gradient
        return self._close(gradient)

    def _close_deferred(self) -> None:
        self._deferred = False
        values = self.ledger.values
        if values.grad is None:
            values.grad = torch.zeros_like(values)
        values.grad.add_(self._close(torch.zeros_like(values)))

    def _close(self, gradient: Tensor) -> Tensor:
        window = self._window
        window.backwards += 1
        self._in_backward, self._closed_in = False, torch._C._current_graph_task_id()
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
            grad = self.ledger.values.grad
            window.expected = gradient if grad is None else grad + gradient
        return gradient

    def _begin(self) -> None:
        """The first sign of a new backward pass."""
        task = torch._C._current_graph_task_id()
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
        if window.backwards >= self.accumulation_steps and not self.in_step:
            grad = self.ledger.values.grad
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
            window.reads = self.chooser.passes(self.step, self.accumulation_steps)

    def _broke_off(self) -> None:
        """A backward pass raised: what it showed is void."""
        window, self._in_backward = self._window, False
        self._watched.clear()
        self.chooser.forget()
        self.taps.forget()
        if window.backwards and self.ledger.values.grad is None:
            self._undo()  # the user starts the window anew
        elif window.backwards and window.reads > 0 and not window.closed:
            window.closed = True  # part of it is in the sums over the window
            self.events["broken_windows"] += 1
            log.warning(
                "Step %d: a backward pass broke off within its window, so nothing is selected; the quota waits.",
                self.step,
            )
        window.held.clear()

    def settle(self) -> None:
        """A window whose passes are done is committed or undone now, if its step is known to be taken or skipped."""
        if self._in_backward or self.in_step or not 0 < self.accumulation_steps <= self._window.backwards:
            return
        grad = self.ledger.values.grad
        if self._moved():
            self.commit()
        elif grad is None or not bool(grad.any()):
            self._undo()

    def restart(self) -> None:
        """Forgets the present window and all that was kept for it: the ledger is about to be another."""
        self.chooser.forget()
        self.taps.forget()
        self._window, self._watched, self._scale = Window(), {}, 1.0
        self._in_backward = self._deferred = False
        self._closed_in, self._opened, self._written = -1, None, None

    def _undo(self) -> None:
        """The window's step was skipped: nothing of it stays."""
        if self._window.before is not None:
            self.ledger.restore(self._window.before)
            self._version = self.ledger.values._version
        self.chooser.undo()
        self._scale = 1.0
        self._window = Window()
        self.events["skipped_steps"] += 1

    # -- selection

    def prepare(self, ready: Sequence[Tensor] | None = None) -> None:
        """Ranks the whole budget beforehand, by weights or by scores that are `ready`."""
        self.chooser.prepare(ready)

    def select_ahead(self) -> None:
        """Selections that read no gradient of the step: before forward, so that no dense gradient is needed."""
        if self.chooser.ahead(self.step):
            self._version = self.ledger.values._version

    def _select(self, gradient: Tensor) -> Tensor:
        """Closes the window's selection; returns its gradient with that of the new entries."""
        window = self._window
        for index in list(window.held):
            self.chooser.offer(self.step, index, window.held.pop(index))
        window.closed = True
        window.before = self.chooser.close(self.step, gradient)
        if window.before is not None:
            self._version = self.ledger.values._version
        return gradient

    def _hold(self, index: int, gradient: Tensor, rows: Tensor | None) -> None:
        held, tensor = self._window.held, self.tensors[index]
        wide = torch.float64 if tensor.parameter.dtype == torch.float64 else torch.float32
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
        """The optimizer is about to step; a window that ends short (last batches of an epoch) closes here.

        `scale`: what the optimizer itself will multiply its gradient by.
        """
        self.step_call = call
        window, values = self._window, self.ledger.values
        if window.expected is not None and values.grad is not None:
            self._scale = scale * _scale(values.grad, window.expected)
        if window.reads > 0 and not window.closed and 0 < window.backwards < self.accumulation_steps:
            if values.grad is None:
                values.grad = torch.zeros_like(values)
            scale = _scale(values.grad, window.gradient)
            fresh = self._select(torch.zeros_like(values))
            values.grad.add_(fresh, alpha=scale)
            self.events["short_windows"] += 1

    def commit(self) -> None:
        """The optimizer has stepped: the window counts, the weights follow the values."""
        self.step_call = None
        if self._window.backwards == 0 and self.tensors:
            self.write_weights()  # momentum alone may have moved them
            return
        self.step += 1
        self._window = Window()
        self.chooser.commit(self.step, self._scale)
        self._scale = 1.0
        self.write_weights()

    def write_weights(self) -> None:
        self.ledger.write_weights()
        self._version = self.ledger.values._version
        self._written = self.ledger.values.detach().clone()

    def _swapped(self) -> bool:
        """Whether values were written through `.data`, which no version tells: an average's, for an evaluation."""
        values, written = self.ledger.values.detach(), self._written
        return written is not None and (written.device != values.device or not torch.equal(written, values))

    def weights_changed(self) -> None:
        """Somebody loaded weights into the model: the values follow them."""
        self.ledger.follow()
        self.ledger.read_weights(only_changed=True)
        self._version = self.ledger.values._version

    def _moved(self) -> bool:
        return self.ledger.values._version != self._version or not self.ledger.agrees()


def _reaches(node: Any) -> bool:
    """Whether this backward pass comes to the node: it does not where only gradients of inputs are asked for."""
    return torch._C._will_engine_execute_node(node)  # pyright: ignore[reportAttributeAccessIssue]


def _scale(now: Tensor, then: Tensor | None) -> float:
    """What clipping or unscaling multiplied the gradient by since backward; 1 where that cannot be seen."""
    if then is None or not bool(then.any()):
        return 1.0
    at = int(then.abs().argmax())
    scale = float(now[at] / then[at])
    return scale if math.isfinite(scale) else 1.0
