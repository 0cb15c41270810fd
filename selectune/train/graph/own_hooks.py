"""Hooks that belong to one tuner: a copy or a pickle of the module takes none of them along."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import unserializable_hook

from selectune.internals import never_compiled


class Own:
    """A hook that a copy of its module, deep or pickled, does not take along: its weights are nobody's but its own."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    @never_compiled
    def __call__(self, *received: Any) -> Any:
        return self._method(*received)

    @property
    def owner(self) -> Any:
        """Whose method it calls."""
        return getattr(self._method, "__self__", None)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> Any:
        return _give_nothing, ()


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of a tensor that calls a method while its owner lives; held strongly, neither would ever go."""
    seen = weakref.WeakMethod(method)

    @unserializable_hook
    def hook(*received: Any) -> Any:
        alive = seen()
        return None if alive is None else alive(*received)

    return hook


def _nothing(*received: Any) -> None:
    del received


def ours(hook: Any) -> bool:
    """Whether a hook is one of ours, or what stands for it in a copy."""
    return isinstance(hook, Own) or hook is _nothing


def _give_nothing() -> Callable[..., None]:
    """What stands for a hook in a pickle."""
    return _nothing
