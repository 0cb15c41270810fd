"""Calls that bypass `__torch_function__`: foreign autograd functions, TorchScript, and torch.func's transforms.

`torch.autograd.Function.apply` (fused losses and kernels take weights), a scripted function and `torch.func.vmap`
would take a weight in scope for a tensor that needs no gradient, and its gradient would be lost silently. While a
tuner is on, and only then, these calls first replace each weight by its Tap, which the engine follows.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.autograd import Function

from selectune.internals import SCRIPTED, WRAPPING
from selectune.train.graph import nodes
from selectune.train.graph.weights import Weight, tapped

_lock = threading.RLock()
_on: set[int] = set()  # ids of those that have weights in scope
_before: dict[Any, Any] = {}  # the functions that ours replace


def watch(who: object) -> None:
    """Replaces weights in the arguments of every such call, until `unwatch(who)` or until `who` is collected."""
    with _lock:
        _on.add(id(who))
        weakref.finalize(who, _end, id(who)).atexit = False
        for kind, name, ours in _OURS:
            if kind.__dict__[name] is not ours:
                _before[kind] = kind.__dict__[name]
                setattr(kind, name, ours)


def unwatch(who: object) -> None:
    """Ends `watch`; the last one puts back the functions that were there before."""
    _end(id(who))


def _end(who: int) -> None:
    with _lock:
        _on.discard(who)
        if _on:
            return
        for kind, name, ours in _OURS:
            if kind.__dict__[name] is ours:
                setattr(kind, name, _before[kind])


def _with_taps(args: Any, kwargs: Any) -> tuple[Any, Any]:
    if any(isinstance(value, Weight) for value in (*args, *kwargs.values())):
        args, kwargs = tuple(map(tapped, args)), {name: tapped(value) for name, value in kwargs.items()}
    return args, kwargs


def _applying(cls: Any, *args: Any, **kwargs: Any) -> Any:
    apply = _before[Function].__get__(None, cls)
    if cls.__module__ == nodes.__name__:
        return apply(*args, **kwargs)
    args, kwargs = _with_taps(args, kwargs)
    before = _forward.of_function
    _forward.of_function = before or torch.is_grad_enabled()
    try:
        return apply(*args, **kwargs)
    finally:
        _forward.of_function = before


class _Forward(threading.local):
    of_function = False


_forward = _Forward()


def in_forward_of_function() -> bool:
    """Whether the forward of a foreign autograd function is running, whose backward may repeat these uses."""
    return _forward.of_function


def _calling(kind: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _with_taps(args, kwargs)
        return _before[kind].__get__(self, kind)(*args, **kwargs)

    return call


def _wrapping(module: Any, name: str) -> Any:
    def wrap(value: Any, *rest: Any) -> Any:
        return _before[module](tapped(value), *rest)

    wrap.__name__ = name
    return wrap


_OURS: tuple[tuple[Any, str, Any], ...] = (
    (Function, "apply", classmethod(_applying)),
    *((kind, "__call__", _calling(kind)) for kind in SCRIPTED),
    *((module, name, _wrapping(module, name)) for module, name in WRAPPING),
)
