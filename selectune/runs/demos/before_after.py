"""The demo of a language model: what it writes before, after and reverted, and what it lost on another text."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import selectune as st
from selectune import tasks
from selectune.errors import IntegrityError, TaskError
from selectune.models.bases import LoadedModel, device, load_model
from selectune.models.evaluate import Retention, evaluate
from selectune.runs.config import RunConfig
from selectune.runs.demos.comparison import digests
from selectune.runs.folder import refuse_used
from selectune.runs.result import Progress
from selectune.runs.training import run
from selectune.tasks import Task

TASK = "demo/logbook"
OTHER = ("text/wikitext2", "demo/sentences")  # the first is measured if its data is there
PROMPTS = ("Log of the brig", "The weather today is", "My best friend is")
BUDGET = 0.001
STEPS = 24
RATE = 2e-3
BATCH = 4
WRITTEN = 32
"""Tokens of a sample."""


@dataclass(frozen=True)
class Sample:
    """What the model writes after a prompt, the likeliest token at each step."""

    prompt: str
    before: str
    after: str
    reverted: str


@dataclass(frozen=True)
class TextDemo:
    """The result of the demo. `before` and `after`: perplexity on the task's validation text."""

    model: str
    weights: int
    task: str
    origin: str
    steps: int
    trained: int
    changed: int
    before: float
    after: float
    samples: Sequence[Sample]
    retention: Retention
    tensors: int
    delta: str
    delta_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        samples = [vars(sample) for sample in self.samples]
        return {**vars(self), "samples": samples, "retention": self.retention.as_json()}


def tell(
    data: str | None = None,
    out: str | None = None,
    model: str = "smollm",
    task: str = TASK,
    steps: int | None = None,
    budget: int | float | None = None,
    seed: int = 6,
    progress: Progress | None = None,
    say: Callable[[str], object] = str,
    overwrite: bool = False,
) -> TextDemo:
    """Trains a language model on a text by ID3, and shows what it writes before, after and with the delta reverted.

    The retention is that of wikitext-2 if `data` or SELECTUNE_DATA has it, otherwise of sentences that are generated
    here. `out` keeps the delta. Raises IntegrityError if the revert left a trace, in a tensor or in a sample.
    """
    began, chosen = time.perf_counter(), tasks.get(task)
    with tempfile.TemporaryDirectory(prefix="selectune-demo-") as scratch:
        folder = str(Path(out or scratch) / "id3")
        if not overwrite:
            refuse_used(Path(folder))
        config = RunConfig(
            model=model, task=task, budget=BUDGET if budget is None else budget, lr=RATE, max_steps=steps or STEPS,
            batch_size=BATCH, eval_every=steps or STEPS, seed=seed, data=data, out=folder, retain=_other(data),
        )  # fmt: skip
        loaded = load_model(model, chosen.head, seed)
        base = digests(loaded.model)
        before, first = _perplexity(loaded, chosen, data), _written(loaded)
        say(f"Before: perplexity {before:.2f} on {task}. {PROMPTS[0]}{first[0]}")
        found = run(config, progress, overwrite=overwrite)
        delta = st.load(found.delta)
        loaded.model.cpu()
        with delta.applied(loaded.model):
            after = _written(loaded)
            loaded.model.cpu()
        say(f"After: perplexity {found.value:.2f}. {PROMPTS[0]}{after[0]}")
        moved = [name for name, digest in digests(loaded.model).items() if base[name] != digest]
        reverted = _written(loaded)
        if moved or reverted != first:
            raise IntegrityError(f"After the revert the model is not the base's: {', '.join(moved[:5]) or reverted}.")
    retention = found.evaluation.retention
    if retention is None:
        raise IntegrityError(f"The run measured no retention on {config.retain}.")
    return TextDemo(
        model, sum(p.numel() for p in loaded.model.parameters()), task, found.origins["train"], found.steps,
        found.trained, found.verification.changed, before, found.value,
        [Sample(*texts) for texts in zip(PROMPTS, first, after, reverted, strict=True)],
        retention, len(base), str(found.delta) if out else "", found.delta_bytes, time.perf_counter() - began,
    )  # fmt: skip


def _other(data: str | None) -> str:
    """The text whose retention is measured."""
    folder = data or os.environ.get(tasks.DATA)
    if not folder:
        return OTHER[1]
    try:
        tasks.load(tasks.get(OTHER[0]), "validation", folder, limit=1)
    except TaskError:
        return OTHER[1]
    return OTHER[0]


def _perplexity(loaded: LoadedModel, task: Task, data: str | None) -> float:
    rows = task.encode(loaded.tokenizer, tasks.load(task, "validation", data).examples, task.max_length)
    loaded.model.to(device())
    return evaluate(loaded.model, loaded.tokenizer, task, rows).value


def _written(loaded: LoadedModel) -> list[str]:
    """What the model writes after each prompt."""
    model, tokenizer = loaded.model.to(device()), loaded.tokenizer
    texts = []
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt").to(device())
        asked = {name: asked[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            found = model.generate(
                **asked, max_new_tokens=WRITTEN, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )  # fmt: skip
        texts.append(tokenizer.decode(found[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts
