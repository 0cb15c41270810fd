"""Hooks and the calls they tell of: which one is still running, and whose a copied hook is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class Own:
    """A hook that a deep copy of its module does not take along: the copy's weights are nobody's but the copy's."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def __call__(self, *received: Any) -> Any:
        return self._method(*received)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing


def _nothing(*received: Any) -> None:
    del received


class Call:
    """The running call `above` frames above the function that makes this.

    torch runs no forward hook, and no step hook, of a call that a KeyboardInterrupt ends; the frame tells.
    """

    def __init__(self, above: int = 1) -> None:
        self._frame = sys._getframe(above + 1)

    def over(self) -> bool:
        """Whether it has ended; what a call that has ended held on to is then let go."""
        try:
            self._frame.clear()
        except RuntimeError:  # it is executing
            return False
        return True
