"""A training step without memory or numbers: torch's operations and the engine's own nodes, run on shapes alone.

Parameters become fake tensors, which have a shape, a dtype and a device and hold no data. The step itself is the real
one: torch's autograd and optimizer, and the nodes and pages of `selectune.train`. Every storage that an operation makes
is counted until it is freed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from selectune import ops
from selectune.bench.meter import Storages
from selectune.bench.workload import DTYPES, Bench, input_gradients
from selectune.internals import TorchDispatchMode, fake_mode, fake_of, tree_iter
from selectune.method import Method
from selectune.scope import Found
from selectune.train.choose.dense_phase import DenseThenSparse
from selectune.train.graph.nodes import Link
from selectune.train.graph.taps import Taps
from selectune.train.optim.holders import held
from selectune.train.support.ledger import Ledger
from selectune.train.support.pages import Page, Spots
from selectune.train.support.proof import BaseCopy

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
aten = torch.ops.aten


@dataclass(frozen=True)
class Traced:
    """Bytes of a step. Weights and batch are not counted."""

    kept: int  # alive between two steps: offsets, ledger, copies of the base, optimizer state
    values: int  # the offsets among them
    state: int  # the optimizer's state among them, but for counters of steps
    saved: int  # what forward adds: saved for backward, and the loss
    peak: int  # the most alive at any moment
    latents: int  # of a dense phase, in place of weights
    gradients: int  # dense ones, if all were alive at once: of tensors that are trained whole, and of latents


class Guesses(TorchDispatchMode):
    """Answers what depends on data as for a batch without padding, whose tokens all differ: every mask is true."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x: Any = args[0] if args else None

        def many(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=torch.int64)

        if func is aten._local_scalar_dense.default:
            return True if x.dtype == torch.bool else 1
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:
            return many(x.numel(), x.dim())
        if func is aten._unique2.default:
            return x.new_empty(x.numel()), many(*x.shape), many(0)
        if func is aten.unique_consecutive.default:  # models ask it whether all examples have as many end tokens
            return x.new_empty(1), many(0), many(0)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            args = (x, [place for index in args[1] for place in _places(index)], *args[2:])
        return func(*args, **(kwargs or {}))


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the places where it is true, one tensor for each of its dimensions."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]


class _FusedAttention(TorchFunctionMode):
    """Attention as a GPU's fused kernels do it: they draw dropout as they go and keep no mask of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            args, kwargs = args[:4], {**(kwargs or {}), "dropout_p": 0.0}
        return func(*args, **(kwargs or {}))


class _Shown:
    """Follows the passes in the tracker's place (`taps.Follower`), and drops what it is shown."""

    def __init__(self, ledger: Ledger, dense: bool) -> None:
        self.ledger, self.dense = ledger, dense
        self.sparse = False  # which entries are selected is not known

    def before_forward(self, inside: bool) -> None: ...

    def pages(self) -> Sequence[tuple[Page, bool]]:
        return [(page, self.dense or page.flat.numel() > 0) for page in self.ledger.pages]

    def recompute(self) -> None: ...

    def stale(self) -> bool:
        return False

    def wants_dense(self, link: Link) -> bool:
        return self.dense

    def offer(self, link: Link, gradient: Tensor, rows: Tensor | None = None) -> None: ...

    def offer_factors(self, link: Link, dy: Tensor, x: Tensor) -> tuple[bool, Tensor | None]:
        return False, None

    def watch(self, link: Link, piece: Tensor) -> None: ...

    def close(self, pages: Sequence[Page], pieces: Sequence[Tensor | None]) -> Tensor:
        return self.ledger.gather(pages, pieces)


@contextlib.contextmanager
def faked(model: nn.Module) -> Iterator[None]:
    """Within this context operations have no data, and the model's tensors are fakes, which they stay."""
    made: dict[int, Tensor] = {}
    ops.release()  # memory with data in it
    with fake_mode() as mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and id(tensor) not in made:
                        fake = fake_of(mode, tensor, torch.device("cpu"))
                        made[id(tensor)] = (
                            nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                        )
                    if tensor is not None:
                        cast(Any, held)[name] = made[id(tensor)]
        with Guesses():
            yield


def trace(
    model: nn.Module, batch: dict[str, Tensor], bench: Bench, found: Found, budget: int, optimizer: Optimizer,
    *, selects: bool = False, watches: bool = False, copies: bool = False, method: Method | None = None,
) -> Traced:  # fmt: skip
    """Counts one step of a model within `faked` that trains `budget` scalars of `found.tensors`, and `found.whole`.

    The optimizer's state is there when the step begins. `selects`: the step selects, so every tensor's dense gradient
    is formed and dropped. `watches`: as many candidates are watched beside the selected entries. `copies`: of all
    tensors in scope there is a copy of the base. `method`: its dense phase, if it has one, is on.
    """
    storages = Storages(known(model, batch))
    with contextlib.ExitStack() as on:
        on.enter_context(storages)
        if bench.device == "cuda":
            on.enter_context(_FusedAttention())
        weights = {id(p) for p in model.parameters()}
        model.requires_grad_(False)
        for tensor in found.whole:
            tensor.parameter.requires_grad_(True)
        phased = method is not None and method.dense is not None
        ledger = Ledger(found.tensors, budget) if phased else _ledger(found, budget, watches)
        base = [t.weight.clone() for t in found.tensors if copies]
        trained = [*([ledger.offsets] if budget else []), *(t.parameter for t in found.whole)]
        phase = _phase(method, model, found, ledger)
        if phase is not None:
            on.callback(phase.free)
            trained += phase.parameters()
        stepping = _begun(optimizer, trained)
        kept = storages.now
        if budget and phase is None:
            taps = Taps(model, found.tensors, ledger.offsets, _Shown(ledger, selects), set())
            on.callback(taps.remove)
        elif not trained:
            input_gradients(model)
        storages.peak = storages.now
        with torch.autocast("cpu", DTYPES[bench.autocast or "bf16"], enabled=bench.autocast is not None):
            loss = cast(Any, model)(**batch).loss
        saved = storages.now - kept
        loss.backward()
        del loss
        if stepping is not None:
            if phase is not None:
                phase.last_word(stepping, held(stepping), set())
            stepping.step()
            stepping.zero_grad(set_to_none=True)
        if phase is not None:
            phase.write_weights()
        del base
        values = ledger.offsets.untyped_storage().nbytes()
        moments = [] if stepping is None else tree_iter(list(stepping.state.values()))
        state = sum(m.untyped_storage().nbytes() for m in moments if isinstance(m, Tensor) and m.dim() > 0)
        latents = 0 if phase is None else size(p for p in phase.parameters() if id(p) not in weights)
        gradients = size(trained) - (values if budget else 0)
        return Traced(kept, values, state, saved, storages.peak, latents, gradients)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def known(model: nn.Module, batch: dict[str, Tensor]) -> dict[int, torch.UntypedStorage]:
    """What lies in memory before a step, by address, for `Storages`."""
    found = [t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *batch.values())]
    return {storage._cdata: storage for storage in found}


class _Base(BaseCopy):
    """Copies of the base without checksums, which shapes do not have."""

    def __init__(self) -> None:
        self.whole = {}


def _phase(method: Method | None, model: nn.Module, found: Found, ledger: Ledger) -> DenseThenSparse | None:
    """The dense phase of a method, turned on; None for any other method."""
    if method is None or method.dense is None:
        return None
    run = (method, method.schedule, ledger, 0)
    phase = DenseThenSparse(*run, kind=method.dense, found=found, base=_Base(), carrier=model)
    phase.begin()
    return phase


def _ledger(found: Found, budget: int, watches: bool) -> Ledger:
    """The ledger once the whole budget is selected, evenly from all tensors, and the last values written."""
    ledger = Ledger(found.tensors, budget)
    ledger.free = ledger.free[:0]
    ledger.written = ledger.offsets.detach().clone()  # type: ignore[attr-defined]  # as the tracker keeps it
    done = 0
    for tensor in found.tensors:
        count = budget * (done + tensor.eligible) // found.eligible - budget * done // found.eligible
        done += tensor.eligible
        flat, slot = (torch.empty(count, dtype=torch.int64) for _ in range(2))
        base = tensor.weight.new_empty(count)
        watched = Spots(torch.empty_like(flat)) if watches else None
        ledger.pages[tensor.index] = Page(flat, slot, base, flat[:0], base[:0], watched=watched)
    return ledger


def _begun(optimizer: Optimizer, trained: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """An optimizer that has its state."""
    if not trained:
        return None
    made = optimizer(trained)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    made.step()
    made.zero_grad(set_to_none=True)
    return made
