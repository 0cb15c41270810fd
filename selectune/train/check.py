"""check: compares the engine's gradients with plain autograd's, to find uses of weights that the engine misses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selectune import ops
from selectune.errors import ConfigError, IntegrityError, TunerError, some
from selectune.internals import will_reach
from selectune.scope import VALUES, ScopedTensor
from selectune.train.engine import Engine
from selectune.train.graph.nodes import Link
from selectune.train.graph.weights import follow, let_go
from selectune.train.support.ledger import Ledger
from selectune.train.support.pages import Page

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}  # relative to the norm of a tensor's gradient; halves: 0.1
NOTHING = 1e-6  # relative to the norm of all gradients: below that a tensor's gradient is rounding


@dataclass(frozen=True)
class Check:
    """The result of `Tuner.check`: how many tensors in scope got a gradient, and the names of those without."""

    tensors: int
    without_gradient: tuple[str, ...]


class Projected:
    """Each tensor's gradient as one number <g, r> with a seeded r, so that memory does not grow with the model."""

    def __init__(self, tensors: Sequence[ScopedTensor]) -> None:
        self.tensors = tensors
        self.sums, self.squares = [0.0] * len(tensors), [0.0] * len(tensors)

    def add(self, index: int, gradient: Tensor, rows: Tensor | None = None) -> None:
        weight = self.tensors[index].form
        draw = torch.rand(weight.shape, generator=torch.Generator().manual_seed(index)).to(weight.device) - 0.5
        if rows is not None:
            draw = draw[rows]
        wide = gradient.detach().double()
        self.sums[index] += float((wide * draw).sum())
        self.squares[index] += float(wide.square().sum())


class _Recorder:
    """Follows the passes in the tracker's place (`taps.Follower`)."""

    def __init__(self, ledger: Ledger, dense: bool) -> None:
        self.dense, self.sparse, self.seen = dense, not dense, Projected(ledger.tensors)
        self.at_support = torch.zeros_like(ledger.offsets)
        self.vector = False  # whether the loss depends on the vector itself
        self._ledger = ledger

    def before_forward(self, inside: bool) -> None:
        del inside

    def pages(self) -> list[tuple[Page, bool]]:
        return [(page, True) for page in self._ledger.pages]

    def recompute(self) -> None:
        pass

    def stale(self) -> bool:
        return False

    def wants_dense(self, link: Link) -> bool:
        return self.dense and will_reach(link.split)

    def offer(self, link: Link, gradient: Tensor, rows: Tensor | None = None) -> None:
        self.seen.add(link.index, gradient, rows)

    def offer_factors(self, link: Link, dy: Tensor, x: Tensor) -> tuple[bool, Tensor | None]:
        del link, dy, x
        return False, None

    def watch(self, link: Link, piece: Tensor) -> None:
        del link, piece

    def close(self, pages: Sequence[Page], pieces: Sequence[Tensor | None]) -> Tensor:
        self.at_support += self._ledger.gather(pages, pieces)
        return torch.zeros_like(self.at_support)


def check(engine: Engine, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> Check:
    """See `Tuner.check`."""
    model, ledger = engine.model, engine.ledger
    if engine.base.shards:
        raise TunerError(
            "check() compares gradients of whole weights, and FSDP2 shards them. Check a copy of the model in one "
            "process, without fully_shard."
        )
    tensors = _compared(engine)
    if engine.chooser.dense or not tensors:
        return Check(0, ())
    run = partial(_run, loss or _loss_of_model, model, batch)
    engine.tracker.write_weights()
    plain, support = _plain(engine, run)
    dense, sampled = (_followed(engine, dense, run) for dense in (True, False))
    whole = sum(plain.squares) ** 0.5
    wrong, nothing = [], []
    for tensor in tensors:
        page = ledger.pages[tensor.index]
        index, norm = tensor.index, plain.squares[tensor.index] ** 0.5
        limit = TOLERANCES.get(tensor.form.dtype, 0.1) * norm + NOTHING * whole
        if norm == 0:
            nothing.append(tensor.name)
        apart = abs(plain.sums[index] - dense.seen.sums[index])
        at_support = float((support[page.slot] - sampled.at_support[page.slot]).norm()) if page.flat.numel() else 0.0
        if not max(apart, at_support) <= limit:  # also for NaN
            wrong.append(f'"{tensor.name}"' + (" (never seen)" if dense.seen.squares[index] == 0 else ""))
    if dense.vector or sampled.vector:
        raise IntegrityError(
            "The loss depends on the tuner's own vector, which is the last of the model's parameters(); perhaps it has "
            "a penalty over them. That gradient would be added to the weights'. Leave the vector out of the loss."
        )
    if wrong:
        raise IntegrityError(
            f"The gradients of {len(wrong)} of the {len(tensors)} tensors in scope differ from plain autograd's on "
            f"this batch: {some(wrong)}. The tuner misses some of their "
            "uses, perhaps in native code. Exclude these tensors: Scope(exclude=...)."
        )
    return Check(len(tensors) - len(nothing), tuple(nothing))


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    found = getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ConfigError("The model gave no .loss for this batch. Pass one: check(batch, loss=callable).")
    return found


def _run(loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any) -> None:
    result = loss(model, batch)
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise ConfigError(f"loss(model, batch) must give a scalar tensor, but gave {type(result).__name__}.")
    if result.requires_grad:
        result.backward()


def _followed(engine: Engine, dense: bool, run: Callable[[], None]) -> _Recorder:
    """One pass with the weights followed by a recorder."""
    ledger = engine.ledger
    recorder = _Recorder(ledger, dense)
    with _untouched(engine, recorder):
        run()
        direct = ledger.offsets.grad  # gradients through weights went to the recorder
        recorder.vector = direct is not None and bool(direct.any())
    return recorder


def _plain(engine: Engine, run: Callable[[], None]) -> tuple[Projected, Tensor]:
    """One pass without the tuner: projections, and the gradient at the support (B,)."""
    tensors, ledger, taps = _compared(engine), engine.ledger, engine.tracker.taps
    seen, support = Projected(ledger.tensors), torch.zeros_like(ledger.offsets)
    carrier = next(m for m in engine.model.modules() if VALUES in m._parameters)

    def hook_of(tensor: ScopedTensor) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                gradient = gradient.to_dense() if gradient.is_sparse else gradient
                page = ledger.pages[tensor.index]
                seen.add(tensor.index, gradient)
                support[page.slot] += ops.gather_entries(gradient, page.flat).to(support)

        return hook

    hooks = []
    with _untouched(engine, _Recorder(ledger, False)), taps.resting():
        vector = carrier._parameters.pop(VALUES)
        try:
            for tensor in tensors:
                let_go(tensor.parameter)
                tensor.parameter.requires_grad_(True)
                hooks.append(tensor.parameter.register_post_accumulate_grad_hook(hook_of(tensor)))
            run()
        finally:
            for hook in hooks:
                hook.remove()
            for tensor in tensors:
                tensor.parameter.requires_grad_(False)
                tensor.parameter.grad = None
                follow(tensor.parameter, taps, tensor.index)
            carrier._parameters[VALUES] = vector
    return seen, support


def _compared(engine: Engine) -> list[ScopedTensor]:
    """Quantised weights are left out: plain autograd has no gradient of them."""
    return [tensor for tensor in engine.found.tensors if tensor.quantised is None]


@contextmanager
def same_chance() -> Iterator[None]:
    """Puts back the random states of torch, NumPy and Python afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _untouched(engine: Engine, recorder: _Recorder) -> Iterator[None]:
    """Hides the pass from the tracker, and puts back gradients, buffers and random states afterwards."""
    parameters = engine.parameters()
    grads, buffers = [p.grad for p in parameters], [(b, b.detach().clone()) for b in engine.model.buffers()]
    for parameter in parameters:
        parameter.grad = None
    try:
        with engine.tracker.taps.followed_by(recorder), same_chance(), torch.enable_grad():
            yield
    finally:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)
