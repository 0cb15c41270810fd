"""Weights in scope: parameters of whose every use the engine learns, wherever that is.

`follow` makes a `Weight` of a parameter without making another object: modules, lists, closures and ties that hold it
hold it still. With gradients on, a use in `F.linear`, `F.embedding` or `F.layer_norm` becomes a node with a sparse
gradient (`sparse`); in any other operation the weight becomes a `Tap`, whose gradient is dense and dropped at once.
With gradients off, and in what only asks for a tensor's form, it is the parameter it always was.
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

SPARSE: dict[Any, Callable[..., Any]] = {}  # by torch's function: ours, which may return NotImplemented


class Weight(nn.Parameter):
    """A parameter in scope while a tuner is on. Copies of it are ordinary parameters."""

    _place: Watched

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
                "torch.autograd.grad was asked for the gradient of a weight in a tuner's scope, which is never formed "
                "whole. Ask for gradients of inputs only, or keep this weight out: Scope(exclude=...)."
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
        del protocol
        with without_dispatch():
            return plain_parameter(self.detach(), self.requires_grad)


class User(Protocol):
    """Who keeps the present graph (`taps.Taps`)."""

    def use(self, index: int) -> Use | None:
        """What stands for the weight in the present graph; None where it needs no gradient."""
        ...

    def in_forward(self) -> bool:
        """Whether a module's forward runs."""
        ...

    def used_without_gradients(self) -> None:
        """A weight was used with gradients off."""
        ...


class Watched:
    """Where a weight belongs: its number with whom, and the class it had."""

    def __init__(self, user: User, index: int, was: type[nn.Parameter]) -> None:
        self.user, self.index, self.was = user, index, was


class Use:
    """A weight in one graph: its link, and the piece of the offsets that stands for it."""

    def __init__(self, link: Link, weight: Tensor, piece: Tensor, beyond_rows: set[int]) -> None:
        self.link, self.weight, self.piece, self.beyond_rows = link, weight, piece, beyond_rows
        self._dense: Tensor | None = None
        self._version = 0  # of the weight, when it was tapped

    def dense(self) -> Tensor:
        """The weight behind a Tap; one for all plain uses, so that their gradients arrive summed."""
        if self._dense is None or self._version != self.weight._version:
            self.count()
            self._version = self.weight._version
            with internals.outside_transforms() if internals.in_transform() else nullcontext():
                self._dense = cast(Tensor, Tap.apply(self.piece, self.weight, self.link))
        return self._dense

    def count(self, rows: bool = False) -> None:
        """One more gradient to expect; recomputed forwards (checkpointing) are not counted again.

        `rows`: of looked-up rows only, so that a row of padding gets none.
        """
        if not rows:
            self.beyond_rows.add(self.link.index)
        if not in_backward():
            self.link.uses[self.link.index] += 1


def follow(parameter: nn.Parameter, user: User, index: int) -> None:
    """Makes a Weight of a parameter; `let_go` makes it what it was."""
    parameter._place = Watched(user, index, type(parameter))  # type: ignore[attr-defined]
    parameter.__class__ = _followed(type(parameter))


def let_go(parameter: nn.Parameter) -> None:
    if isinstance(parameter, Weight):
        parameter.__class__ = parameter._place.was  # pyright: ignore[reportAttributeAccessIssue]
        del parameter._place


@functools.cache
def _followed(kind: type[nn.Parameter]) -> type[Weight]:
    return Weight if kind is nn.Parameter else type(kind.__name__, (Weight, kind), {})


def use_of(value: Any) -> Use | None:
    """The use of a weight in the present graph; None for anything else, and where it needs no gradient."""
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
            "while a tuner is attached, so its base could not be restored. Cast the model before attach, or keep the "
            "weight out: Scope(exclude=...)."
        )
    return use


def tapped(value: Any) -> Any:
    """A weight behind its Tap; anything else as it is."""
    use = use_of(value)
    return value if use is None else use.dense()


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a weight itself is changed: that is no use of it."""
    name = getattr(func, "__name__", "")
    if name in ("__set__", "__delete__", "__setitem__") or (name.endswith("_") and not name.endswith("__")):
        return bool(args) and isinstance(args[0], Weight)
    if name.startswith("__i") and name.endswith("__") and name in _IN_PLACE:
        return bool(args) and isinstance(args[0], Weight)
    return isinstance(kwargs.get("out"), Weight)


_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_IN_PLACE = {f"__i{op}__" for op in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split()}

# what only asks for a tensor's form, or is about the parameter and not its numbers
FORM: set[Any] = (
    {
        getattr(torch.Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "layout",
            "ndim",
            "is_leaf",
            "grad",
            "data",
            "is_cuda",
            "is_cpu",
            "is_sparse",
            "is_quantized",
            "is_meta",
            "itemsize",
            "nbytes",
            "_version",
            "is_nested",
            "grad_fn",
            "output_nr",
            "names",
            "retains_grad",
            "is_mkldnn",
            "is_mps",
            "is_xpu",
            "_backward_hooks",
            "_post_accumulate_grad_hooks",
        )
        if hasattr(torch.Tensor, name)
    }
    | {
        getattr(torch.Tensor, name)
        for name in (
            "size",
            "dim",
            "numel",
            "nelement",
            "stride",
            "storage_offset",
            "is_contiguous",
            "is_floating_point",
            "is_complex",
            "is_signed",
            "element_size",
            "data_ptr",
            "untyped_storage",
            "storage",
            "get_device",
            "__len__",
            "__repr__",
            "__hash__",
            "dim_order",
            "ndimension",
            "is_shared",
            "is_inference",
            "detach",
            "numpy",
            "tolist",
            "item",
            "__array__",
            "register_hook",
            "register_post_accumulate_grad_hook",
            "retain_grad",
            "is_set_to",
        )
    }
    | {torch.is_floating_point, torch.is_complex, torch.numel, torch.detach, torch.equal, torch.is_same_size}
)
FORM.add(internals.can_share)  # fmt: skip
