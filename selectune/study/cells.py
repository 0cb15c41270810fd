"""A cell of a study: the settings of one run, and the key that follows from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selectune.errors import StudyError
from selectune.runs.config import RunConfig

PHASES = ("search", "main")
"""A trial rate on held-out training rows, or a run that counts."""

BASE = "base"
"""The method of a cell that trains nothing: the base itself is measured, with its head drawn from the seed."""

OF_BASE = (
    "model", "task", "train", "validation", "text", "label", "kind", "data", "plugin", "revision", "dtype",
    "trust_remote_code", "max_length", "seed", "eval_size", "pattern", "words", "shots", "train_size",
    "train_size_seed", "hold_out",
)  # fmt: skip
"""Settings that a cell of the base takes. `train_size`: of the rows that `shots` are drawn from."""

FILES = ("train", "validation", "retain", "soft_labels")
"""Settings that name a file of rows or of text."""

_APART = ("out", "data", "report_to", "save_every", "keep", "full_checkpoints", "plugin")
"""Settings that change no number of a run."""

_LATER = ("pattern", "words", "optimizer", "shots", "quantise", "soft_labels", "eval_size")
"""Settings that runs of earlier versions lack: where they are not set, keys are those of before."""


@dataclass(frozen=True)
class Cell:
    """One run of a study. `phase`: one of `PHASES`; `settings`: those of `RunConfig` that are not its defaults.
    `measure`: more tasks that the delta is measured on. `name`: of the method in tables, if it is not its spec.
    `title`: of the task in tables, if it is not its name or that of its file.

    >>> cell = Cell("main", {"model": "demo", "task": "glue/rte", "method": "id3:exp=1", "budget": 1000})
    >>> cell.key == Cell("main", {**cell.settings, "seed": 6, "data": "elsewhere"}).key
    True
    """

    phase: str
    settings: Mapping[str, Any]
    measure: tuple[str, ...] = ()
    name: str | None = None
    title: str | None = None

    @property
    def untuned(self) -> bool:
        """Whether nothing is trained, and the base is measured."""
        return self.settings.get("method") == BASE

    @functools.cached_property
    def config(self) -> RunConfig:
        """The settings, checked; those of full fine-tuning on the same rows for the base. Raises ConfigError."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.settings.items()
        }
        return RunConfig(**{**given, "method": "full"} if self.untuned else given)

    @functools.cached_property
    def key(self) -> str:
        """16 hex digits of a hash of everything that changes a number of the run. A file counts by what is in it."""
        config = self.config
        told = {**config.as_json(), "method": config.canonical, "lr": config.learning_rate, "phase": self.phase}
        told |= {"method": BASE} if self.untuned else {}
        told |= {"measure": self.measure} if self.measure else {}
        files = {name: told[name] for name in FILES if told[name]}
        told |= {name: bits for name, path in files.items() if (bits := _bits_of(path))}
        unset = (*_APART, *(name for name in _LATER if not told[name]))
        told = {name: value for name, value in sorted(told.items()) if name not in unset}
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def with_(self, **settings: Any) -> Cell:
        """The cell with other settings."""
        return dataclasses.replace(self, settings={**self.settings, **settings})


def of_base(own: Mapping[str, Any], *shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings that a cell of the base shares with others, without those that only training has.

    `own`: those of its method's mapping. What is no setting stays, to be refused. Raises StudyError for what would make
    the base another model, or measure it on other rows.
    """
    options = {field.name for field in dataclasses.fields(RunConfig)}
    wrong = [key for key in own if key in (options | {"rates"}) - set(OF_BASE)]
    wrong += [key for settings in shared for key in settings if key == "quantise"]
    if wrong:
        raise StudyError(
            f"The base is not trained and is measured as it is loaded, so it takes no {wrong[0]}. It takes "
            f"{', '.join(OF_BASE)}."
        )
    every = {key for settings in (own, *shared) for key in settings}
    if "hold_out" in every and "train" not in every:
        raise StudyError(
            "The base is measured on the validation rows of a published task, and hold_out measures the other methods "
            "on training rows. Leave out one of the two."
        )
    kept = set(OF_BASE) - (set() if "shots" in every else {"train_size", "train_size_seed"})
    return [{k: v for k, v in settings.items() if k in kept or k not in options} for settings in shared]


def _bits_of(path: str) -> str | None:
    """A hash of a file's bytes; None if there is no such file, as for a data set of the hub."""
    try:
        told = os.stat(path)
        return _hashed(path, told.st_size, told.st_mtime_ns) if stat.S_ISREG(told.st_mode) else None
    except OSError:
        return None


@functools.lru_cache(maxsize=256)
def _hashed(path: str, size: int, modified: int) -> str:
    del size, modified  # they make a changed file another question
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
