"""What the tests with threads share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


class Beside:
    """Work in a thread of its own; `raised()` waits for its end."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._raised = work, []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001  the test looks at it
            self._raised.append(error)

    def raised(self) -> list[Exception]:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self._raised
