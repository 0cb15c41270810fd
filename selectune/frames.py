"""The only file that reads Python's call stack: to see when a call has ended, and what a caller knows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any


class Call:
    """Handle on a caller's stack frame, `above` frames further up; says whether that call is still running.

    torch runs no forward hook and no step hook after a KeyboardInterrupt, but the frame shows that the call has ended.
    """

    def __init__(self, above: int = 1) -> None:
        self._frame = sys._getframe(above + 1)

    def over(self) -> bool:
        """Whether the call has ended; if so, its variables are freed."""
        try:
            self._frame.clear()
        except RuntimeError:  # it is executing
            return False
        return True


def methods_of(kind: type | object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, variables) of the running methods of an object, or of all objects of a class, innermost first.

    For callbacks whose caller knows something (a folder, a file) and does not pass it on.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        variables = frame.f_locals
        if "self" in variables:
            owner = variables["self"]
            if owner is kind or (isinstance(kind, type) and isinstance(owner, kind)):
                yield frame.f_code.co_name, variables
        frame = frame.f_back
