"""A cell of a study: the settings of one run, and the key that follows from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selectune.runs.config import RunConfig

PHASES = ("search", "main")
"""A trial rate on held-out training rows, or a run that counts."""

_APART = ("out", "data", "report_to", "save_every", "keep", "full_checkpoints", "plugin")
"""Settings that change no number of a run."""

_LATER = ("quantise",)
"""Settings that cells of earlier studies lack; a cell that does not use them has its old key."""


@dataclass(frozen=True)
class Cell:
    """One run of a study. `phase`: one of `PHASES`; `settings`: those of `RunConfig` that are not its defaults.
    `measure`: more tasks that the delta is measured on. `name`: of the method in tables, if it is not its spec.

    >>> cell = Cell("main", {"model": "demo", "task": "glue/rte", "method": "id3:exp=1", "budget": 1000})
    >>> cell.key == Cell("main", {**cell.settings, "seed": 6, "data": "elsewhere"}).key
    True
    """

    phase: str
    settings: Mapping[str, Any]
    measure: tuple[str, ...] = ()
    name: str | None = None

    @functools.cached_property
    def config(self) -> RunConfig:
        """The settings, checked. Raises ConfigError."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.settings.items()
        }
        return RunConfig(**given)

    @functools.cached_property
    def key(self) -> str:
        """16 hex digits of a hash of everything that changes a number of the run. Equal cells have equal keys."""
        config = self.config
        told = {**config.as_json(), "method": config.canonical, "lr": config.learning_rate, "phase": self.phase}
        told |= {"measure": self.measure} if self.measure else {}
        told = {n: v for n, v in sorted(told.items()) if n not in _APART and (n not in _LATER or v is not None)}
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def with_(self, **settings: Any) -> Cell:
        """The cell with other settings."""
        return dataclasses.replace(self, settings={**self.settings, **settings})
