"""Calls that ask no `__torch_function__`: autograd functions of others, TorchScript's, and torch.func's transforms.

A weight in scope would go into `torch.autograd.Function.apply` (fused losses and kernels are given weights), into a
scripted function or into `torch.func.vmap` as a tensor that needs no gradient, and its gradient would be lost in
silence. While a tuner is on, and only then, they first put in its place what the engine can follow.
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
_on: set[int] = set()  # by whoever has weights in scope
_own: dict[Any, Any] = {}  # what stood there before


def watch(who: object) -> None:
    """Arguments of every such call are revealed, until `unwatch(who)` or until it is no more."""
    with _lock:
        _on.add(id(who))
        weakref.finalize(who, _end, id(who)).atexit = False
        for kind, name, ours in _OURS:
            if kind.__dict__[name] is not ours:
                _own[kind] = kind.__dict__[name]
                setattr(kind, name, ours)


def unwatch(who: object) -> None:
    """Ends `watch`; with the last one what was there before is back, torch's own or somebody's."""
    _end(id(who))


def _end(who: int) -> None:
    with _lock:
        _on.discard(who)
        if _on:
            return
        for kind, name, ours in _OURS:
            if kind.__dict__[name] is ours:
                setattr(kind, name, _own[kind])


def _revealed(args: Any, kwargs: Any) -> tuple[Any, Any]:
    if any(isinstance(value, Weight) for value in (*args, *kwargs.values())):
        args, kwargs = tuple(map(tapped, args)), {name: tapped(value) for name, value in kwargs.items()}
    return args, kwargs


def _applying(cls: Any, *args: Any, **kwargs: Any) -> Any:
    apply = _own[Function].__get__(None, cls)
    if cls.__module__ == nodes.__name__:
        return apply(*args, **kwargs)
    args, kwargs = _revealed(args, kwargs)
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
    """Whether the forward of somebody's autograd function runs, whose backward may come to these uses again."""
    return _forward.of_function


def _calling(kind: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _revealed(args, kwargs)
        return _own[kind].__get__(self, kind)(*args, **kwargs)

    return call


def _wrapping(module: Any, name: str) -> Any:
    def wrap(value: Any, *rest: Any) -> Any:
        return _own[module](tapped(value), *rest)

    wrap.__name__ = name
    return wrap


_OURS: tuple[tuple[Any, str, Any], ...] = (
    (Function, "apply", classmethod(_applying)),
    *((kind, "__call__", _calling(kind)) for kind in SCRIPTED),
    *((module, name, _wrapping(module, name)) for module, name in WRAPPING),
)
