"""Whether a call is still running, also where an interrupt ended it and no hook told."""

from __future__ import annotations

import sys


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
