"""Folders of studies and runs that were never trained, for tests of the report."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from selectune.delta import Delta, Patch
from selectune.study.records import Record, Setting, line_of

METHODS = ("full", "id3", "id3:every=10", "static-d3", "repeat", "pafi", "fish", "random", "bitfit", "lora:r=8")
KINDS = (
    "attention.self.query.weight",
    "attention.self.value.weight",
    "attention.self.value.bias",
    "output.dense.weight",
)


def delta(seed: int, layers: int = 6, scalars: int = 40, order: bool = True) -> Delta:
    """A delta over `layers` layers of four tensors and a classifier."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"bert.encoder.layer.{i}.{kind}" for i in range(layers) for kind in KINDS] + ["classifier.weight"]
    patches, rank = [], 0
    for name in names:
        numel = 64 if name.endswith("bias") else 4096
        count = int(torch.randint(0, min(numel, scalars), (), generator=generator))
        indices = torch.randperm(numel, generator=generator)[:count].sort().values
        ranks = torch.arange(rank, rank + count, dtype=torch.int32)
        rank += count
        shape = (numel,) if numel == 64 else (64, 64)
        value = torch.randn(count, generator=generator)
        patches.append(Patch.make(name, shape, indices, value, torch.zeros(count), order=ranks if order else None))
    return Delta(patches, [], {"base": {"structure": "0" * 64}})


def history(steps: int, selected: int, level: float) -> list[dict[str, float]]:
    draw = random.Random(steps)
    return [
        {"step": i, "loss": level + draw.random() / i, "learning_rate": 5e-4, "selected": selected * i // steps}
        for i in range(1, steps + 1)
    ]


def run_json(record: Record, log: Sequence[dict[str, float]]) -> str:
    s = record.setting
    config = {"model": s.model, "task": s.task, "method": s.method, "on": s.on, "budget": s.budget}
    config |= {"lr": record.lr, "seed": record.seed}
    told = {"task": s.task, "metric": record.metric, "value": record.value, "examples": record.examples}
    told |= {"kind": "classification", "method": s.method, "best": None, "steps": record.steps, "config": config}
    told |= {"selected": record.selected, "history": list(log), **record.more}
    return json.dumps(told)


def study(
    folder: Path,
    methods: Sequence[str] = METHODS,
    tasks: Sequence[str] = ("glue/stsb", "trec"),
    seeds: int = 5,
    steps: int = 60,
    name: str = "A study",
    forgetting: bool = True,
) -> list[Record]:
    """Writes a study of every method on every task with each seed, and returns its records."""
    draw = random.Random(7)
    records = []
    for t, task in enumerate(tasks):
        for m, method in enumerate(methods):
            for seed in range(seeds):
                key = f"{t:04x}{m:04x}{seed:08x}"
                value = 0.8 - 0.02 * m + 0.05 * t + draw.gauss(0, 0.01)
                more = {"trained": 4000, "changed": 3990, "budget": 4000, "seconds": 60 + 5 * m + draw.random()}
                more |= {
                    "peak_bytes": 1.2e9 - 3e7 * m,
                    "delta_bytes": 90_000_000 if method == "full" else 24_000 + 999 * m,
                }
                more |= {"run": f"{m:08x}{seed:08x}", "versions": {"selectune": "0.1.0", "torch": "2.13.0"}}
                more |= {"forgetting": 0.3 - 0.02 * m + draw.gauss(0, 0.02)} if forgetting else {}
                setting = Setting("demo", task, method, None, None if method in ("full", "lora:r=8") else 0.0017)
                told = {
                    "lr": 5e-4,
                    "seed": seed,
                    "metric": "accuracy",
                    "lowest": False,
                    "steps": steps,
                    "examples": 200,
                }
                for step in range(steps // 6, steps, steps // 6):
                    early = value - 0.3 * (1 - step / steps)
                    records.append(
                        Record(
                            key,
                            "main",
                            setting,
                            **told,
                            step=step,
                            value=early,
                            selected=4000 * step // steps,
                            last=False,
                        )
                    )
                last = Record(
                    key, "main", setting, **told, step=steps, value=value, selected=4000, last=True, more=more
                )
                records.append(last)
                cell = folder / "cells" / key
                cell.mkdir(parents=True)
                (cell / "run.json").write_text(run_json(last, history(steps, 4000, 0.4 + 0.02 * m)))
                if seed == 0 and t == 0:
                    delta(m, order=method != "random").save(cell)
    (folder / "study.json").write_text(json.dumps({"name": name, "question": "Which is best?", "grid": {}}))
    (folder / "results.jsonl").write_text("".join(map(line_of, records)))
    return records
