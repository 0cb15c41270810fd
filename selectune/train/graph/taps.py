"""Taps keep the present autograd graph, and learn where forward passes of the attached model begin and end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selectune import internals, ops
from selectune.beside import side_of
from selectune.frames import Call
from selectune.internals import go_on_compiling, in_backward, never_compiled, stop_compiling
from selectune.scope import ScopedTensor, plain
from selectune.train.graph import functions, sparse
from selectune.train.graph.nodes import Link, Listener, Reach, SplitOffsets
from selectune.train.graph.own_hooks import Own
from selectune.train.graph.weights import Place, Use, follow, let_go
from selectune.train.support.pages import Page

log = logging.getLogger("selectune")
UNKNOWN = 1 << 60  # uses: more than will ever be counted down

__all__ = ["Taps", "sparse"]


class _Running(threading.local):
    """What is running in a thread."""

    def __init__(self) -> None:
        self.entered: list[tuple[nn.Module, Any]] = []  # hooked modules in forward, outermost first; what compiled them
        self.call: Call | None = None  # the outermost module's
        self.with_gradients = False  # whether that call began with gradients on
        self.busy = False  # the engine itself is at work


class Follower(Listener, Protocol):
    """Follows the passes of a model: the tracker, or `check` in its place."""

    sparse: bool  # it never wants dense gradients

    def before_forward(self, inside: bool) -> None:
        """The outermost module is about to run (`inside`), or a weight is used outside of any module."""
        ...

    def pages(self) -> Sequence[tuple[Page, bool]]:
        """The pages of a new graph, and whether each tensor needs a gradient in it."""
        ...

    def recompute(self) -> None:
        """A forward is repeated inside a backward pass."""
        ...

    def stale(self) -> bool:
        """Whether the present graph was made for another step or support."""
        ...


class Taps:
    """Keeps the present graph. The first use of a weight makes it, and all forwards until a backward pass share it."""

    def __init__(
        self,
        model: nn.Module,
        tensors: Sequence[ScopedTensor],
        offsets: nn.Parameter,
        follower: Follower,
        beyond_rows: set[int],
    ) -> None:
        self.offsets, self.follower, self.tensors = offsets, follower, tensors
        self.beyond_rows = beyond_rows  # tensors that were ever used in other ways than looking up rows
        self.uses = [0] * len(tensors)  # gradients expected per tensor in the next backward pass through this graph
        self.grad_was_off = False  # part of a forward ran without gradients: perhaps reentrant checkpointing
        self._repeats = False  # that part was in a foreign autograd function, which may be a checkpoint
        self.asleep = False  # uses of weights are left to torch
        self.skip_unneeded = True  # False under reentrant checkpointing, whose inputs must require gradients
        self._running = _Running()
        self.thread: int | None = None  # the one that trains; other threads may read weights
        self._stay = all(t.used is t.parameter for t in tensors)  # weights keep their memory between two passes
        self._warned = False  # that compiled code runs uncompiled
        self._graph: list[Use | None] | None = None
        self._making = threading.RLock()
        self._spare: Tensor | None = None  # a piece of the present graph
        self._handles: list[RemovableHandle] = []
        try:
            self._handles.extend(self._hook(model))
            functions.watch(self)
            for tensor in tensors:
                self._follow(tensor)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        functions.unwatch(self)
        for tensor in self.tensors:
            self._let_go(tensor)
        self.forget()
        ops.release()

    def _follow(self, tensor: ScopedTensor) -> None:
        if tensor.quantised is None:
            follow(tensor.used, self, tensor.index)
        else:
            side = side_of(tensor.quantised)
            side.follow(sparse.beside(side, tensor.quantised, Place(self, tensor.index, type(tensor.parameter))))

    def _let_go(self, tensor: ScopedTensor) -> None:
        if tensor.quantised is None:
            let_go(tensor.used)
        else:
            side_of(tensor.quantised).follow(None)

    def forget(self) -> None:
        """Drops the present graph, and what is known of the coming backward pass."""
        self.renew()
        self.grad_was_off = self._repeats = False

    def renew(self) -> None:
        """The next use starts a new graph."""
        self._graph = self._spare = None
        self.uses[:] = [UNKNOWN] * len(self.uses)  # of this graph: a second backward pass never completes them
        self.uses = [0] * len(self.tensors)
        self.grad_was_off = self._repeats

    def trains_here(self) -> bool:
        """Whether this thread trains, as far as is known. A thread that has ended trains no more."""
        if self.thread is None or self.thread == threading.get_ident():
            return True
        if all(thread.ident != self.thread for thread in threading.enumerate()):
            self.thread = None
        return self.thread is None

    def trains_in_this_thread(self) -> None:
        """An optimizer steps in this thread."""
        self.thread = threading.get_ident()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Leaves uses of weights to torch."""
        before, self.asleep = self.asleep, True
        try:
            yield
        finally:
            self.asleep = before

    @contextmanager
    def followed_by(self, follower: Follower) -> Iterator[None]:
        """Lets another follower see the passes, on graphs of their own."""
        before, self.follower = self.follower, follower
        self.forget()
        try:
            yield
        finally:
            self.follower = before
            self.forget()

    # -- weights (User)

    def use(self, index: int) -> Use | None:
        """The weight in the present graph; None if it needs no gradient there."""
        if self.asleep or not self.offsets.requires_grad:  # somebody has frozen the attached model for a while
            return None
        if in_backward():
            self.follower.recompute()
        elif not self._running.entered and self.trains_here() and (self._graph is None or self.follower.stale()):
            self._prepare(False)
        return self._open()[index]

    def in_forward(self) -> bool:
        return bool(self._running.entered) and not self.asleep

    def used_without_gradients(self) -> None:
        running = self._running
        if running.busy or self.asleep or in_backward() or not self.trains_here():
            return  # the engine's own use, or another thread's
        self.grad_was_off = True
        self._repeats = self._repeats or functions.in_forward_of_function()
        if running.with_gradients and running.entered:
            self.skip_unneeded = False

    def _prepare(self, inside: bool) -> None:
        self._running.busy = True
        try:
            self.follower.before_forward(inside)
        finally:
            self._running.busy = False

    def _open(self) -> list[Use | None]:
        graph = self._graph
        if graph is None:
            with self._making:
                graph = self._graph = self._graph or self._new_graph()
        return graph

    def _new_graph(self) -> list[Use | None]:
        pages = self.follower.pages()
        with internals.outside_transforms() if internals.in_transform() else nullcontext():
            pieces = SplitOffsets.apply(self.offsets, [page for page, _ in pages], self.follower)
        self._spare = pieces[0] if pieces else None
        return [
            Use(
                Link(t.index, page, self.follower, self.uses, piece.grad_fn, self._stay, self.follower.sparse),
                plain(t.used), piece, self.beyond_rows,
            )
            if needed or not self.skip_unneeded
            else None
            for t, piece, (page, needed) in zip(self.tensors, pieces, pages, strict=True)
        ]  # fmt: skip

    # -- forward

    def _hook(self, model: nn.Module) -> Iterator[RemovableHandle]:
        scoped = {id(tensor.parameter) for tensor in self.tensors}
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule) or not any(id(p) in scoped for p in module.parameters()):
                continue
            yield module.register_forward_pre_hook(Own(self._enter), prepend=True)
            yield module.register_forward_hook(Own(self._leave), always_call=True)

    @never_compiled
    def _enter(self, module: nn.Module, args: Any) -> None:
        del args
        compiling, running = stop_compiling(), self._running
        if compiling is not None and not self._warned:
            self._warned = True
            log.warning("torch.compile: while a tuner is on, the forward of the attached model runs uncompiled.")
        if running.call is not None and running.call.over():  # interrupted
            running.entered.clear()
        running.entered.append((module, compiling))
        if len(running.entered) > 1:
            return
        running.call = Call(above=2)  # torch's call of the module, above the hook
        running.with_gradients = torch.is_grad_enabled()
        if in_backward():
            self.follower.recompute()
        elif self.trains_here():
            if running.with_gradients:
                self.trains_in_this_thread()
            self._prepare(True)
            if running.with_gradients:
                self.grad_was_off = self._repeats  # else an evaluation used them
        if running.with_gradients and not self.asleep and self.offsets.requires_grad:
            self._open()

    @never_compiled
    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        del args
        running = self._running
        if not running.entered or running.entered[-1][0] is not module:
            return None  # another hook raised before this module was entered
        _, compiling = running.entered.pop()
        if not running.entered:
            running.call = None
            output = self._reached(output)
        else:
            output = None
        go_on_compiling(compiling)
        return output

    def _reached(self, output: Any) -> Any:
        """The output joined to the offsets, if backward() would fail because no selected entry took part; else None."""
        if self.asleep or not self.offsets.requires_grad or not torch.is_grad_enabled() or in_backward():
            return None
        tensors = [part for part in internals.tree_leaves(output) if isinstance(part, Tensor)]
        if any(part.requires_grad for part in tensors) or not any(part.is_floating_point() for part in tensors):
            return None
        self._open()
        spare = self._spare
        if spare is None:
            return None
        return internals.tree_map_only(Tensor, lambda t: Reach.apply(t, spare) if t.is_floating_point() else t, output)


def _weight(tensor: ScopedTensor) -> Tensor:
    """The numbers that a use of the weight computes with; what is stored, if the layer of a quantised weight does."""
    return tensor.weight if tensor.quantised is None else tensor.parameter
