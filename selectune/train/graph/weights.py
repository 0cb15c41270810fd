"""Weights in scope: parameters that report every use, wherever it happens.

`follow` turns a parameter into a `Weight` and keeps the object, so modules, lists, closures and ties still hold it.
With gradients on, a use in `F.linear`, `F.embedding` or `F.layer_norm` becomes a node with a sparse gradient
(`sparse`). In any other operation the weight becomes a `Tap`, whose dense gradient is dropped at once. With gradients
off, and in operations that only ask for a tensor's form, it is an ordinary parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from selectune import internals
from selectune.errors import IntegrityError, TunerError
from selectune.internals import in_backward, plain_parameter, without_dispatch
from selectune.train.graph.nodes import Link, Tap

SPARSE: dict[Any, Callable[..., Any]] = {}  # {torch's function: ours}; ours may return NotImplemented


class Weight(nn.Parameter):
    """A parameter in scope while a tuner is on. Copies of it are ordinary parameters."""

    _place: Place

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _REQUIRES_GRAD:
            if args[0]._place.user.in_forward():
                return True  # as in training without a tuner, for models whose forward asks
        elif func in FORM or _writes(func, args, kwargs):
            pass
        elif func is torch.autograd.grad:
            raise TunerError(
                "torch.autograd.grad was asked for the gradient of a weight in a tuner's scope. The tuner never forms "
                "the whole of it. Ask for gradients of inputs only, or exclude this weight: Scope(exclude=...)."
            )
        elif torch.is_grad_enabled():
            sparse = SPARSE.get(func)
            if sparse is not None:
                result = sparse(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            args, kwargs = internals.tree_map(tapped, (args, kwargs))
        else:
            for value in (*args, *kwargs.values()):
                for one in value if isinstance(value, list | tuple) else (value,):
                    use_of(one)
        with without_dispatch():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            with without_dispatch():
                copy = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
            copy.__class__ = self._place.was
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with without_dispatch():
            return plain_parameter(self.detach(), self.requires_grad)


class User(Protocol):
    """The keeper of the present graph (`taps.Taps`)."""

    def use(self, index: int) -> Use | None:
        """The weight in the present graph; None if it needs no gradient there."""
        ...

    def in_forward(self) -> bool:
        """Whether a module's forward is running."""
        ...

    def used_without_gradients(self) -> None:
        """A weight was used with gradients off."""
        ...


class Place:
    """Who keeps the graph of a weight, the weight's number there, and the class that the parameter had."""

    def __init__(self, user: User, index: int, was: type[nn.Parameter]) -> None:
        self.user, self.index, self.was = user, index, was


class Use:
    """A weight in one graph: its link, and the piece of the offsets that trains it."""

    def __init__(self, link: Link, weight: Tensor, piece: Tensor, beyond_rows: set[int]) -> None:
        self.link, self.weight, self.piece, self.beyond_rows = link, weight, piece, beyond_rows
        self._dense: Tensor | None = None
        self._version = 0  # of the weight when it was tapped

    def dense(self) -> Tensor:
        """The weight behind a Tap. All plain uses share one, so their gradients arrive summed."""
        if self._dense is None or self._version != self.weight._version:
            self.count()
            self._version = self.weight._version
            with internals.outside_transforms() if internals.in_transform() else nullcontext():
                self._dense = cast(Tensor, Tap.apply(self.piece, self.weight, self.link))
        return self._dense

    def count(self, rows: bool = False) -> None:
        """Expects one more gradient; a forward that checkpointing repeats does not count again.

        `rows`: the use only looks up rows, so that the padding row gets no gradient.
        """
        if not rows:
            self.beyond_rows.add(self.link.index)
        if not in_backward():
            self.link.uses[self.link.index] += 1


def follow(parameter: nn.Parameter, user: User, index: int) -> None:
    """Turns a parameter into a Weight; `let_go` undoes it."""
    parameter._place = Place(user, index, type(parameter))  # type: ignore[attr-defined]
    parameter.__class__ = _followed(type(parameter))


def let_go(parameter: nn.Parameter) -> None:
    if isinstance(parameter, Weight):
        parameter.__class__ = parameter._place.was  # pyright: ignore[reportAttributeAccessIssue]
        del parameter._place


@functools.cache
def _followed(kind: type[nn.Parameter]) -> type[Weight]:
    return Weight if kind is nn.Parameter else type(kind.__name__, (Weight, kind), {})


def use_of(value: Any) -> Use | None:
    """The use of a weight in the present graph; None for any other value, and if the weight needs no gradient."""
    if not isinstance(value, Weight):
        return None
    place = value._place
    if not torch.is_grad_enabled():
        place.user.used_without_gradients()
        return None
    use = place.user.use(place.index)
    if use is not None and use.weight.dtype != value.dtype:
        raise IntegrityError(
            f"A weight in scope (of shape {tuple(use.weight.shape)}) was cast from {use.weight.dtype} to {value.dtype} "
            "while a tuner is attached, so its base could not be restored. Cast the model before attach, or exclude "
            "the weight: Scope(exclude=...)."
        )
    return use


def tapped(value: Any) -> Any:
    """A weight behind its Tap; any other value unchanged."""
    use = use_of(value)
    return value if use is None else use.dense()


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the call changes a weight in place, which is no use of it."""
    name = getattr(func, "__name__", "")
    if name in ("__set__", "__delete__", "__setitem__") or (name.endswith("_") and not name.endswith("__")):
        return bool(args) and isinstance(args[0], Weight)
    if name.startswith("__i") and name.endswith("__") and name in _IN_PLACE:
        return bool(args) and isinstance(args[0], Weight)
    return isinstance(kwargs.get("out"), Weight)


_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_IN_PLACE = {f"__i{op}__" for op in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split()}

# Operations that only ask for a tensor's form, or concern the parameter and not its numbers.
_ASKED = """shape dtype device layout ndim is_leaf grad data is_cuda is_cpu is_sparse is_quantized is_meta itemsize
    nbytes _version is_nested grad_fn output_nr names retains_grad is_mkldnn is_mps is_xpu _backward_hooks
    _post_accumulate_grad_hooks""".split()
_CALLED = """size dim numel nelement stride storage_offset is_contiguous is_floating_point is_complex is_signed
    element_size data_ptr untyped_storage storage get_device __len__ __repr__ __hash__ dim_order ndimension is_shared
    is_inference detach numpy tolist item __array__ register_hook register_post_accumulate_grad_hook retain_grad
    is_set_to""".split()
FORM: set[Any] = {
    *(getattr(torch.Tensor, name).__get__ for name in _ASKED if hasattr(torch.Tensor, name)),
    *(getattr(torch.Tensor, name) for name in _CALLED),
    *(torch.is_floating_point, torch.is_complex, torch.numel, torch.detach, torch.equal, torch.is_same_size),
    internals.can_share,
}
