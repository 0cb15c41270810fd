"""The demo: one small pretrained model, one task; base, random mask, LoRA, ID3 and full fine-tuning side by side."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import selectune as st
from selectune import tasks
from selectune.delta import digest_bits, inventory
from selectune.errors import IntegrityError, TaskError, some
from selectune.models.bases import DEMO, LoadedModel, device, load_model, longest
from selectune.models.evaluate import evaluate
from selectune.runs.config import RunConfig
from selectune.runs.folder import refuse_used
from selectune.runs.result import Progress, RunResult, Update
from selectune.runs.training import run
from selectune.tasks import Task

PREFERRED = "glue/stsb"
FALLBACK = "demo/topic"
LORA = "lora:r=8"
METHODS = {"random": "random mask", LORA: "LoRA, r=8", "id3": "ID3", "full": "full fine-tuning"}
DENSE = (LORA, "full")  # these take no budget
BUDGET = 0.0017  # of the weights, about 39,000 of 22.7 million
STEPS = {PREFERRED: 240, FALLBACK: 120}
RATES = {FALLBACK: {LORA: 2e-3, "full": 1e-4}}  # the defaults of these two are for thousands of steps


@dataclass(frozen=True)
class Row:
    """A line of the table. `share` is that of `trained` in the base's weights; `step_seconds` is a step's median."""

    name: str
    value: float
    trained: int
    share: float
    step_seconds: float
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
    """The result of the demo."""

    model: str
    weights: int
    task: str
    origin: str
    metric: str
    chance: float | None
    steps: int
    rows: Sequence[Row]
    revert: Revert
    seconds: float
    delta: str

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "rows": [vars(row) for row in self.rows], "revert": vars(self.revert)}


class Stopwatch:
    """Passes a run's progress on, and measures how long its steps take."""

    def __init__(self, shown: Progress | None, title: str) -> None:
        self._shown, self._title = shown, title
        self._step, self._at = 0, 0.0
        self._took: list[float] = []

    def start(self, title: str, steps: int) -> None:
        self._at = time.perf_counter()
        if self._shown is not None:
            self._shown.start(self._title, steps)

    def update(self, update: Update) -> None:
        if update.step > self._step:
            now = time.perf_counter()
            self._took.append((now - self._at) / (update.step - self._step))
            self._step, self._at = update.step, now
        if self._shown is not None:
            self._shown.update(update)

    def stop(self) -> None:
        if self._shown is not None:
            self._shown.stop()

    @property
    def step_seconds(self) -> float:
        """The median, so that compilation in the first steps does not count."""
        return statistics.median(self._took) if self._took else 0.0


def demo(
    data: str | None = None,
    out: str | None = None,
    model: str = DEMO,
    task: str | None = None,
    steps: int | None = None,
    budget: int | float = BUDGET,
    seed: int = 6,
    progress: Progress | None = None,
    say: Callable[[str], object] = str,
    overwrite: bool = False,
) -> DemoResult:
    """Compares the base, a random mask, LoRA, ID3 and full fine-tuning, and proves that ID3's delta can be reverted.

    The task is STS-B if `data` or SELECTUNE_DATA has it, otherwise sentences that are generated here; the hub is asked
    only if `task` is given. LoRA is trained on the latter only, if peft is installed. `out` keeps the deltas; runs that
    are in it are refused, or with `overwrite` replaced. `say` gets each finding as a sentence. Raises IntegrityError if
    the revert left a trace.
    """
    began = time.perf_counter()
    chosen = _choose(data, task)
    steps = steps or STEPS.get(chosen.name, max(STEPS.values()))
    methods, why = _methods(chosen)
    if why:
        say(why)
    with tempfile.TemporaryDirectory(prefix="selectune-demo-") as scratch:
        folders = {method: Path(out or scratch) / method.partition(":")[0] for method in methods}
        for folder in folders.values() if not overwrite else ():
            refuse_used(folder)
        base, weights = _base(chosen, data, model, seed)
        rows = [base]
        say(_found(base))
        results: dict[str, RunResult] = {}
        for method in methods:
            config = RunConfig(
                model=model,
                task=chosen.name,
                method=method,
                budget=None if method in DENSE else budget,
                lr=RATES.get(chosen.name, {}).get(method),
                max_steps=steps,
                eval_every=steps,
                seed=seed,
                data=data,
                out=str(folders[method]),
            )
            name = METHODS[method]
            watch = Stopwatch(progress, name)
            results[method] = found = run(config, watch, overwrite=overwrite)
            share, seconds = found.trained / weights, watch.step_seconds
            rows.append(Row(name, found.value, found.trained, share, seconds, found.delta_bytes, found.seconds))
            say(_found(rows[-1]))
        id3 = results["id3"]
        revert = _revert(chosen, id3, data)
    return DemoResult(
        model, weights, chosen.name, id3.origins["validation"], chosen.metric_name, chosen.chance, steps, rows, revert,
        time.perf_counter() - began, str(id3.delta) if out else "",
    )  # fmt: skip


def _methods(task: Task) -> tuple[list[str], str]:
    """The methods that are trained on a task, and the reason if LoRA is left out."""
    if task.name != FALLBACK:
        why = f"LoRA is left out: so few steps of {task.name} are too few for it, and its row would say nothing."
    elif find_spec("peft") is None:
        why = "LoRA is left out, since the package peft is not installed (pip install 'selectune[peft]')."
    else:
        return list(METHODS), ""
    return [name for name in METHODS if name != LORA], why


def _found(row: Row) -> str:
    return f"{row.name[0].upper()}{row.name[1:]}: the score is {row.value:.3f}."


def _choose(data: str | None, name: str | None) -> Task:
    preferred, folder = tasks.get(name or PREFERRED), data or os.environ.get(tasks.DATA)
    if name is not None:
        return preferred
    if not folder:
        return tasks.get(FALLBACK)
    try:
        for split in ("train", "validation"):
            tasks.load(preferred, split, folder, limit=1)
    except TaskError:
        if data is not None:
            raise  # the user named this folder, so missing data is an error
        return tasks.get(FALLBACK)
    return preferred


def _base(task: Task, data: str | None, model: str, seed: int) -> tuple[Row, int]:
    """The base with a fresh head, measured, and its number of weights."""
    began = time.perf_counter()
    loaded = load_model(model, task.head, seed)
    length = longest(loaded.model, loaded.tokenizer, None, task.max_length)
    value = _value(loaded, task, data, length)
    weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    return Row("base", value, 0, 0.0, 0.0, 0, time.perf_counter() - began), weights


def _value(loaded: LoadedModel, task: Task, data: str | None, length: int) -> float:
    examples = tasks.load(task, "validation", data).examples
    rows = task.encode(loaded.tokenizer, examples, length)
    loaded.model.to(device())
    return evaluate(loaded.model, loaded.tokenizer, task, rows).value


def _revert(task: Task, result: RunResult, data: str | None) -> Revert:
    """Applies the ID3 delta to a freshly loaded base, measures it, reverts, and compares every bit."""
    loaded = load_model(result.config.model, task.head, result.config.seed)
    delta = st.load(result.delta)
    before = digests(loaded.model)
    delta.apply(loaded.model)
    tuned = digests(loaded.model)
    value = _value(loaded, task, data, result.max_length)
    delta.revert(loaded.model)
    after = digests(loaded.model)
    if after != before or tuned == before:
        moved = [name for name in before if before[name] != after[name]]
        raise IntegrityError(
            f"After the revert {len(moved)} tensors are not the base's: {some(moved)}."
            if moved
            else "The delta changed no tensor of the base."
        )
    return Revert(len(before), result.verification.changed, value, True)


def digests(model: Any) -> dict[str, str]:
    return {entry.name: digest_bits(entry.tensor) for entry in inventory(model).entries}
