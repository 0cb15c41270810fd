"""Taps: how the engine learns of every use of a weight, without changing a module's class or code.

While a hooked module runs forward, the parameters in scope are shadowed by tensors of a subclass. A
shadow in `F.linear` or `F.embedding` becomes a node with a sparse gradient; in any other operation it
becomes a `Tap`, whose gradient is dense and dropped at once. Names, state dict and parameters() are
untouched, and outside forward nothing is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from selectune import ops
from selectune.scope import ScopedTensor
from selectune.train import functions
from selectune.train.autograd import Link, Listener, Reach, SparseEmbedding, SparseLayerNorm, SparseLinear, Split, Tap
from selectune.train.calls import Call, Own
from selectune.train.ledger import Page

UNKNOWN = 1 << 60  # of uses: more than will ever be counted down


class Shadow(torch.Tensor):
    """Stands for one weight during a forward pass."""

    _use: Use

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sparse = SPARSE.get(func)
        if sparse is not None and torch.is_grad_enabled():
            result = sparse(*args, **kwargs)
            if result is not NotImplemented:
                return result
        reveal = _plain if func in PLAIN else _tapped
        args, kwargs = pytree.tree_map(reveal, (args, kwargs))
        return func(*args, **kwargs)


class Use:
    """What a shadow knows: its weight, the piece of the values it stands for, and its link."""

    def __init__(self, link: Link, weight: nn.Parameter, piece: Tensor, taps: Taps) -> None:
        self.link, self.weight, self.piece, self.taps = link, weight.detach(), piece, taps
        self._dense: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight behind a Tap; one for all plain uses, so that their gradients arrive summed."""
        if not torch.is_grad_enabled():
            self.taps.grad_was_off = True
            self.taps.skip_unneeded = False
            return self.weight
        if self._dense is None:
            self.count()
            self._dense = cast(Tensor, Tap.apply(self.piece, self.weight, self.link))
        return self._dense

    def count(self) -> None:
        """One more gradient to expect; recomputed forwards (checkpointing) are not counted again."""
        if not in_backward():
            self.link.uses[self.link.index] += 1


class Taps:
    """Sets the shadows when a hooked module is entered, and takes them away when the last is left.

    `before_forward()` runs as the outermost module is entered; `pages()` gives the ledger's pages for a
    new graph, None for a tensor that needs no gradient in it; `recompute()` runs when a forward is
    repeated inside a backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Sequence[ScopedTensor],
        values: Tensor,
        listener: Listener,
        before_forward: Callable[[], None],
        pages: Callable[[], Sequence[tuple[Page, bool]]],
        recompute: Callable[[], None],
    ) -> None:
        self.values, self.listener, self.tensors = values, listener, tensors
        self.before_forward, self.pages, self.recompute = before_forward, pages, recompute
        self.uses = [0] * len(tensors)  # gradients expected per tensor in the next backward pass through this graph
        self.grad_was_off = False  # part of a forward ran without gradients: reentrant checkpointing, perhaps
        self.asleep = False  # weights are trained as torch does it: no shadows
        self.skip_unneeded = True  # until then: reentrant checkpointing needs inputs that require gradients
        self._entered: list[nn.Module] = []  # hooked modules whose forward runs, the outermost first
        self._call: Call | None = None  # of the outermost
        self._shadows: list[Shadow | None] | None = None
        self._spare: Tensor | None = None  # a piece of the present graph
        self._owners = [[_owner(model, name) for name in t.names] for t in tensors]
        self._rnns = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
        self._handles = list(self._hook(model))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._hide()
        ops.release()

    def forget(self) -> None:
        """Ends the life of the present nodes: the next forward starts a new graph."""
        self._shadows = self._spare = None
        self.uses[:] = [UNKNOWN] * len(self.uses)  # a second backward pass through this graph takes other ways
        self.uses = [0] * len(self.tensors)
        self.grad_was_off = False

    def _hook(self, model: nn.Module) -> Iterator[RemovableHandle]:
        owners = {id(module) for named in self._owners for module, _ in named}
        for module in model.modules():
            if any(id(inner) in owners for inner in module.modules()):
                yield module.register_forward_pre_hook(Own(self._enter), prepend=True)
                yield module.register_forward_hook(Own(self._leave), always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        del args
        if self._call is not None and self._call.over():  # interrupted
            self._entered.clear()
            self._hide()
        self._entered.append(module)
        if len(self._entered) > 1:
            return
        self._call = Call(above=2)  # torch's, above the hook
        if in_backward():
            self.recompute()
        else:
            self.before_forward()
        if torch.is_grad_enabled() and not self.asleep:
            self._show()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        del args
        if not self._entered or self._entered[-1] is not module:
            return None  # another hook raised before it was entered
        self._entered.pop()
        if self._entered:
            return None
        self._call = None
        self._hide()
        return self._reached(output)

    def _reached(self, output: Any) -> Any:
        """The output, if backward() would otherwise fail because no selected entry took part in it; else None."""
        if self._shadows is None or self._spare is None or not torch.is_grad_enabled() or in_backward():
            return None
        tensors = [part for part in pytree.tree_leaves(output) if isinstance(part, Tensor)]
        if any(part.requires_grad for part in tensors) or not any(part.is_floating_point() for part in tensors):
            return None
        spare = self._spare
        return pytree.tree_map_only(Tensor, lambda t: Reach.apply(t, spare) if t.is_floating_point() else t, output)

    def _show(self) -> None:
        if self._shadows is None:
            self._shadows = self._new_graph()
        for tensor, owners, shadow in zip(self.tensors, self._owners, self._shadows, strict=True):
            for module, name in owners if shadow is not None else ():
                if module._parameters.get(name) is tensor.parameter:  # torch.func.functional_call puts others there
                    module.__dict__[name] = shadow
        functions.watch(self, _tapped)
        for rnn in self._rnns:  # keeps its weights in a list of its own
            rnn.__dict__["_flat_weights"] = [getattr(rnn, name) for name in rnn._flat_weights_names]

    def _new_graph(self) -> list[Shadow | None]:
        pages = self.pages()
        pieces = Split.apply(self.values, [page for page, _ in pages], self.listener)
        self._spare = pieces[0] if pieces else None
        return [
            _shadow(Use(Link(t.index, page, self.listener, self.uses, piece.grad_fn), t.parameter, piece, self))
            if needed or not self.skip_unneeded
            else None
            for t, piece, (page, needed) in zip(self.tensors, pieces, pages, strict=True)
        ]

    def _hide(self) -> None:
        functions.unwatch(self)
        for owners in self._owners:
            for module, name in owners:
                module.__dict__.pop(name, None)
        for rnn in self._rnns:
            rnn.__dict__["_flat_weights"] = [getattr(rnn, name) for name in rnn._flat_weights_names]


def _shadow(use: Use) -> Shadow:
    shadow = use.weight.as_subclass(Shadow)
    shadow._use = use
    return shadow


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _tapped(value: Any) -> Any:
    return value._use.dense() if isinstance(value, Shadow) else value


def _plain(value: Any) -> Any:
    return value._use.weight if isinstance(value, Shadow) else value


def in_backward() -> bool:
    """Whether the calling code runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    use, own = (part._use if isinstance(part, Shadow) else None for part in (weight, bias))
    if use is None and (own is None or weight.requires_grad or isinstance(input, Shadow)):
        return NotImplemented
    weight = _plain(weight)
    if weight.dim() != 2:
        return NotImplemented
    x, bias = _tapped(input), _plain(bias)
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype or x.is_nested:
        return NotImplemented
    piece, link = _counted(use, x)
    return SparseLinear.apply(x, piece, weight, link, bias, *_counted(own, x))


def _counted(use: Use | None, x: Tensor) -> tuple[Tensor | None, Link | None]:
    """The piece and the link of one more use, if there is one."""
    if use is None:
        return None, None
    use.count()
    return use.piece.to(x.device), use.link


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    x, parts = _tapped(input), (weight, bias)
    if any(p is None or (not isinstance(p, Shadow) and p.requires_grad) for p in parts):
        return NotImplemented
    plain = [_plain(p) for p in parts]
    one_type = all(p.dtype == x.dtype and p.device == x.device for p in plain)
    if len(normalized_shape) != 1 or not one_type or torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    arguments: list[Any] = []
    for part, value in zip(parts, plain, strict=True):
        arguments += [value, *_counted(part._use if isinstance(part, Shadow) else None, x)]
    return SparseLayerNorm.apply(x, eps, *arguments)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    del norm_type, sparse
    if max_norm is not None or scale_grad_by_freq or not isinstance(weight, Shadow):
        return NotImplemented
    use = weight._use
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    use.count()
    return SparseEmbedding.apply(input, use.piece.to(input.device), use.weight, padding, use.link)


SPARSE: dict[Any, Callable[..., Any]] = {F.linear: _linear, F.embedding: _embedding, F.layer_norm: _layer_norm}

# what only looks at a tensor's form shall not build a dense node
PLAIN: set[Any] = {
    getattr(torch.Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "data", "is_cuda",
        "is_sparse", "is_quantized", "is_meta", "itemsize", "nbytes", "_version", "is_nested",
    )
} | {
    getattr(torch.Tensor, name)
    for name in (
        "size", "dim", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "is_floating_point",
        "is_complex", "element_size", "data_ptr", "untyped_storage", "get_device", "__len__", "__repr__", "__hash__",
        "dim_order", "ndimension", "type", "is_shared", "is_inference",
    )
}  # fmt: skip
