"""One training step on tensors without memory: how many bytes would be alive at its peak, and of what.

The model runs on the device "meta" while every storage that an operation makes is counted until it is
freed. A linear layer, an embedding and an attention kernel stand in for what the engine and torch run:
inputs are saved for backward, the weight's gradient is formed only where the method needs it, and dropped.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from selectune.bench.workload import DTYPES, Bench
from selectune.internals import TorchDispatchMode, data_is_all_there, tree_iter
from selectune.train.graph.nodes import SparseLayerNorm
from selectune.train.graph.recompute import rebuilt, source


@dataclass(frozen=True)
class Kind:
    """What a step does with the gradients of weights."""

    dense: bool  # every tensor's dense gradient is formed and dropped (a selecting step)
    kept: bool = False  # dense gradients stay until the step (full fine-tuning)
    frozen: bool = False  # no weight is trained at all


@dataclass(frozen=True)
class Traced:
    """Bytes of a step, weights not counted."""

    saved: int  # alive when forward ends: saved for backward, and the loss
    peak: int  # the most alive at any moment
    largest_gradient: int  # the largest dense gradient of one tensor


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = known  # addresses of storages that are there already, and of those alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # `if mask.all()`: as with a batch without padding
            return bool(1) if args[0].dtype == torch.bool else 1
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class Linear(torch.autograd.Function):
    """y = x W^T + b; saves x and W, forms W's gradient only for a step that needs it.

    The engine does not save an x that can be made again; full fine-tuning, torch's own, does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Kind) -> Tensor:
        ctx.kind, ctx.source = kind, None if kind.kept else source(x)
        ctx.save_for_backward(x if ctx.source is None else None, weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x = rebuilt(ctx.source) if x is None else x
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        dense = None
        if ctx.kind.dense or ctx.kind.kept:
            dense = dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        bias = dy.sum(tuple(range(dy.dim() - 1))) if ctx.needs_input_grad[2] else None
        return dx, dense.to(weight.dtype) if ctx.kind.kept and dense is not None else None, bias, None


class Embedding(torch.autograd.Function):
    """Rows of a table; on a selecting step the gradient of the rows that occur, else none."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, kind: Kind) -> Tensor:
        ctx.kind, ctx.shape = kind, table.shape
        ctx.save_for_backward(ids)
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kind.kept:
            return None, dy.new_empty(ctx.shape), None
        if ctx.kind.dense:
            dy.reshape(-1, dy.shape[-1]).clone()
        return None, None, None


class Attention(torch.autograd.Function):
    """A fused attention kernel: saves query, key, value, output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class Engine(TorchFunctionMode):
    """Puts the stand-ins in place, and casts what autocast would cast (there is none on "meta")."""

    def __init__(self, kind: Kind, low: torch.dtype | None, fused: bool) -> None:
        super().__init__()
        self.kind, self.low, self.fused = kind, low, fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            ids, table = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            return Embedding.apply(ids, table, self.kind) if table.requires_grad else func(*args, **kwargs)
        if func is F.layer_norm and not (self.kind.kept or self.kind.frozen or self.low):
            return self._layer_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.low is not None and func in LOWER:
            args = [self._cast(a) for a in args]
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.low) if floats and self.low is not None else value

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        input = self._cast(input)
        if weight.requires_grad:
            return Linear.apply(input, weight, bias, self.kind)
        return F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))

    def _layer_norm(
        self, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        if weight is None or bias is None or len(normalized_shape) != 1 or weight.dtype != input.dtype:
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        return cast(Any, SparseLayerNorm).apply(input, eps, weight, None, None, bias, None, None)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        query, key, value = (self._cast(t) for t in (query, key, value))
        dropout = more.get("dropout_p", rest[1] if len(rest) > 1 else 0.0)
        if self.fused or not dropout:
            return Attention.apply(query, key, value)
        return F.scaled_dot_product_attention(query, key, value, *rest, **more)


LOWER = {
    torch.matmul, torch.bmm, torch.mm, torch.baddbmm, torch.addmm, torch.einsum, torch.Tensor.matmul,
    torch.Tensor.bmm, torch.Tensor.mm, torch.Tensor.__matmul__,
}  # fmt: skip


def step(model: nn.Module, batch: dict[str, Tensor], bench: Bench, kind: Kind) -> Traced:
    """Runs one step of a model on "meta" and counts."""
    for parameter in model.parameters():
        parameter.requires_grad_(not kind.frozen)
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    low = None if bench.autocast is None else DTYPES[bench.autocast]
    storages, engine = Storages(known), Engine(kind, low, fused=bench.device == "cuda")
    # what depends on data (labels that count, say) is taken to be all there
    with data_is_all_there(), _dropping(model, kind), _input_gradients(model, kind):
        with storages, _inside(model, engine):
            loss = model(**batch).loss
            saved = storages.now
            loss.backward()
        del loss
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    peak = storages.peak
    model.zero_grad(set_to_none=True)
    return Traced(saved, peak, largest)


@contextlib.contextmanager
def _inside(model: nn.Module, engine: Engine) -> Iterator[None]:
    """The engine is on while any module runs forward, also where checkpointing repeats it inside backward."""
    depth = 0

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            engine.__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            engine.__exit__(None, None, None)

    handles = [m.register_forward_pre_hook(enter, prepend=True) for m in model.modules()]
    handles += [m.register_forward_hook(leave, always_call=True) for m in model.modules()]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _dropping(model: nn.Module, kind: Kind) -> Iterator[None]:
    """Dense gradients of whatever has no stand-in are dropped as soon as they are there."""
    handles = []
    if not kind.kept and not kind.frozen:

        def drop(parameter: Tensor) -> None:
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters()]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _input_gradients(model: nn.Module, kind: Kind) -> Iterator[None]:
    """The floor: the embeddings' output asks for a gradient, no weight does."""
    handle = None
    if kind.frozen:
        embeddings: Any = cast(Any, model).get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    yield
    if handle is not None:
        handle.remove()
