"""What a run gives: while it lasts to a progress bar, and at its end to its user and to run.json."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from selectune import plugins
from selectune.delta import versions
from selectune.models.evaluate import Evaluation
from selectune.runs.config import RunConfig
from selectune.train import Verification


@dataclass(frozen=True)
class Update:
    """The state of a run that a progress bar shows."""

    step: int
    steps: int
    loss: float | None
    selected: int
    budget: int
    metric: float | None


class Progress(Protocol):
    """A follower of a run."""

    def start(self, title: str, steps: int) -> None: ...
    def update(self, update: Update) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """The result of a run. `value` is the metric of the saved delta, read back and applied to the bare base."""

    evaluation: Evaluation
    best: Mapping[str, Any] | None  # the best evaluation on the way: step, value, selected
    steps: int
    selected: int
    budget: int
    trained: int
    verification: Verification
    delta: Path
    delta_bytes: int
    seconds: float
    events: Mapping[str, int]
    history: Sequence[Mapping[str, Any]]
    model: Mapping[str, Any]
    origins: Mapping[str, str]
    max_length: int
    config: RunConfig
    kind: str  # of its task
    run: str  # its id, which a resumed run keeps
    resumed: int | None = None  # the step of the checkpoint that it went on from

    @property
    def value(self) -> float:
        return self.evaluation.value

    def as_json(self) -> dict[str, Any]:
        """The result as `train --json` prints it and run.json keeps it."""
        counts = {name: getattr(self, name) for name in ("steps", "selected", "budget", "trained")}
        return {
            **self.evaluation.as_json(),
            "kind": self.kind,
            "method": self.config.method,
            "best": None if self.best is None else dict(self.best),
            **counts,
            "changed": self.verification.changed,
            **({"checkpoints": reached} if (reached := _reached(self.history)) else {}),
            "delta": str(self.delta),
            "delta_bytes": self.delta_bytes,
            "seconds": round(self.seconds, 3),
            "run": self.run,
            "resumed": self.resumed,
            "max_length": self.max_length,
            "events": dict(self.events),
            "model": dict(self.model),
            "data": dict(self.origins),
            "config": self.config.as_json(),
            "plugins": plugins.used(self.config.recipe, self.config.task),
            "versions": package_versions(),
        }


def best_of(
    history: Sequence[Mapping[str, Any]], step: int, selected: int, value: float, lowest: bool
) -> Mapping[str, Any] | None:
    """The best evaluation of the run with the last one, as the papers report it; None if there was only one."""
    points = [
        {"step": record["step"], "value": record["metric"], "selected": record["selected"]}
        for record in history
        if "metric" in record
    ]
    last = {"step": step, "value": value, "selected": selected}
    best = min if lowest else max
    return best([*points, last], key=lambda point: point["value"]) if points else None


def _reached(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The budgets that were reached on the way: the step, the scalars selected then, and the metric."""
    values = {record["step"]: record["metric"] for record in history if "metric" in record}
    return [{**record, "value": values.get(record["step"])} for record in history if "budget" in record]


def package_versions() -> dict[str, str]:
    found = {**versions(), "python": platform.python_version()}
    for package in ("transformers", "accelerate", "datasets", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
