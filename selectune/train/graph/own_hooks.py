"""Hooks that belong to one tuner: they stay behind when a module is copied or pickled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import unserializable_hook

from selectune.internals import never_compiled


class Own:
    """A hook that stays behind when its module is deep-copied or pickled."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    @never_compiled
    def __call__(self, *received: Any) -> Any:
        return self._method(*received)

    @property
    def owner(self) -> Any:
        """The object whose method it calls."""
        return getattr(self._method, "__self__", None)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> Any:
        return _give_nothing, ()


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor's hook that calls a method while its owner lives; a strong reference would keep both for ever."""
    reference = weakref.WeakMethod(method)

    @unserializable_hook
    def hook(*received: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*received)

    return hook


def _nothing(*received: Any) -> None:
    del received


def ours(hook: Any) -> bool:
    """Whether a hook is one of ours, or its stand-in in a copy."""
    return isinstance(hook, Own) or hook is _nothing


def _give_nothing() -> Callable[..., None]:
    """The stand-in for a hook in a pickle."""
    return _nothing
