"""What is read off Python's call stack, here and nowhere else: calls without hooks, callers that pass nothing on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any


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


def methods_of(kind: type | object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, variables) of the running methods of an object, or of any object of a class, innermost first.

    For callbacks whose caller knows a thing (a folder, a file) and does not pass it on.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        variables = frame.f_locals
        if "self" in variables:
            owner = variables["self"]
            if owner is kind or (isinstance(kind, type) and isinstance(owner, kind)):
                yield frame.f_code.co_name, variables
        frame = frame.f_back
