"""Small studies: a tiny model, rows of one's own, runs of a few steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiny_kit import sentence, write_rows

from selectune.study.records import Record, Setting


def rows(folder: Path) -> dict[str, Any]:
    """Files of rows, and the task that a grid names for them."""
    rng = random.Random(0)
    for name, count in (("train", 40), ("more", 20)):
        texts = [sentence(rng) for _ in range(count)]
        write_rows(folder / f"{name}.jsonl", [{"q": t, "dog": str("dog" in t.split())} for t in texts])
    train, more = str(folder / "train.jsonl"), str(folder / "more.jsonl")
    return {"train": train, "validation": more, "text": ["q"], "label": "dog"}


def grid(tiny: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "models": [str(tiny)],
        "tasks": [rows(folder)],
        "methods": ["id3", "lora:r=1"],
        "budgets": [60],
        "seeds": [1, 2],
        "settings": {"max_steps": 3, "batch_size": 4, "eval_every": 2},
        **more,
    }


def record(seed: int, value: float, step: int = 10, last: bool = True, **more: Any) -> Record:
    setting = Setting("demo", "glue/rte", more.pop("method", "id3"), None, 0.0017)
    told = {"metric": "accuracy", "lowest": False, "steps": 10, "selected": 5, "examples": 277, "lr": 5e-4}
    told |= {"phase": "main", "cell": f"c{seed}"} | more
    return Record(setting=setting, seed=seed, step=step, value=value, last=last, **told)
