"""The demo: one small pretrained model, one task, the base against ID3, a random mask and full fine-tuning."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import selectune as st
from selectune import tasks
from selectune.delta import digest_bits, inventory
from selectune.errors import IntegrityError, TaskError
from selectune.harness.config import RunConfig
from selectune.harness.evaluate import encode, evaluate
from selectune.harness.models import DEMO, device, load_model, longest
from selectune.harness.train import Progress, RunResult, run
from selectune.tasks import Task

PREFERRED = "glue/stsb"
FALLBACK = "demo/grammaticality"
METHODS = ("id3", "random", "full")
BUDGET = 0.0017  # of the weights, about 39,000 of 22.7 million
STEPS = 240


@dataclass(frozen=True)
class Settings:
    """What a task needs to be learnt in a few hundred steps. None: the command line's default."""

    lr: float | None = None
    full_lr: float | None = None
    batch_size: int = 16
    steps: int = STEPS


SETTINGS = {FALLBACK: Settings(lr=2e-3, full_lr=2e-4, batch_size=32, steps=320)}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    value: float
    trained: int
    delta_bytes: int
    seconds: float


@dataclass(frozen=True)
class Revert:
    """The proof that the delta leaves no trace: every tensor's digest before apply and after revert."""

    tensors: int
    scalars_changed: int
    value_applied: float
    same_bits: bool


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    model: str
    task: str
    origin: str
    metric: str
    chance: float
    steps: int
    rows: Sequence[Row]
    revert: Revert
    seconds: float
    delta: str

    def as_json(self) -> dict[str, Any]:
        plain = {
            k: getattr(self, k) for k in ("model", "task", "origin", "metric", "chance", "steps", "delta", "seconds")
        }
        return {**plain, "rows": [vars(row) for row in self.rows], "revert": vars(self.revert)}


def demo(
    data: str | None = None,
    out: str | None = None,
    model: str = DEMO,
    task: str | None = None,
    steps: int | None = None,
    budget: int | float = BUDGET,
    seed: int = 6,
    progress: Progress | None = None,
) -> DemoResult:
    """Trains and measures the base, ID3, a random mask and full fine-tuning, reverts the delta and proves it.

    STS-B where `data`, SELECTUNE_DATA or the hub has it, otherwise sentences that are generated here. Deltas are kept
    under `out` if it is given. About 3 minutes on 2 idle cores. Raises IntegrityError if the revert left a trace.
    """
    began = time.perf_counter()
    chosen = _choose(data, task)
    settings = SETTINGS.get(chosen.name, Settings())
    steps = steps or settings.steps
    with tempfile.TemporaryDirectory(prefix="selectune-demo-") as scratch:
        folder = Path(out or scratch)
        rows = [_base(chosen, data, model, seed)]
        results: dict[str, RunResult] = {}
        for method in METHODS:
            config = RunConfig(
                model=model,
                task=chosen.name,
                method=method,
                budget=None if method == "full" else budget,
                lr=settings.full_lr if method == "full" else settings.lr,
                batch_size=settings.batch_size,
                max_steps=steps,
                eval_every=steps,
                seed=seed,
                data=data,
                out=str(folder / method),
            )
            results[method] = found = run(config, progress)
            rows.append(Row(method, found.value, found.trained, found.delta_bytes, found.seconds))
        revert = _revert(chosen, results["id3"], data)
    return DemoResult(
        model=model,
        task=chosen.name,
        origin=results["id3"].origins["validation"],
        metric=chosen.metric_name,
        chance=chosen.chance,
        steps=steps,
        rows=rows,
        revert=revert,
        seconds=time.perf_counter() - began,
        delta=str(results["id3"].delta) if out else "",
    )


def _choose(data: str | None, name: str | None) -> Task:
    if name is not None:
        return tasks.get(name)
    preferred = tasks.get(PREFERRED)
    try:
        for split in ("train", "validation"):
            tasks.load(preferred, split, data, limit=1)
    except TaskError:
        if data is not None:
            raise  # a folder was named, so its lack is an error and not a reason to do something else
        return tasks.get(FALLBACK)
    return preferred


def _base(task: Task, data: str | None, model: str, seed: int) -> Row:
    began = time.perf_counter()
    loaded = load_model(model, task, seed)
    split = tasks.load(task, "validation", data)
    length = longest(loaded.model, loaded.tokenizer, None, task.max_length)
    loaded.model.to(device())
    found = evaluate(loaded.model, loaded.tokenizer, task, encode(loaded.tokenizer, split.examples, length))
    return Row("base", found.value, 0, 0, time.perf_counter() - began)


def _revert(task: Task, result: RunResult, data: str | None) -> Revert:
    """Applies the ID3 delta to a base that is loaded anew, measures it, reverts, compares every bit."""
    loaded = load_model(result.config.model, task, result.config.seed)
    delta = st.load(result.delta)
    split = tasks.load(task, "validation", data)
    rows = encode(loaded.tokenizer, split.examples, result.max_length)
    before = _digests(loaded.model)
    delta.apply(loaded.model)
    tuned = _digests(loaded.model)
    loaded.model.to(device())
    value = evaluate(loaded.model, loaded.tokenizer, task, rows).value
    delta.revert(loaded.model)
    after = _digests(loaded.model)
    if after != before or tuned == before:
        moved = [name for name in before if before[name] != after[name]]
        raise IntegrityError(
            f"After the revert {len(moved)} tensors are not the base's: {', '.join(moved[:5])}."
            if moved
            else "The delta changed no tensor of the base."
        )
    return Revert(len(before), result.verification.changed, value, True)


def _digests(model: Any) -> dict[str, str]:
    return {entry.name: digest_bits(entry.tensor) for entry in inventory(model).entries}
