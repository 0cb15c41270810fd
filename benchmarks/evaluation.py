"""Evaluation on a real model: perplexity against plain torch, and generation in batches against row by row.

    python benchmarks/evaluation.py                          # both, with smollm, on rows of SELECTUNE_DATA
    python benchmarks/evaluation.py --only generation --rows 32 --tokens 48

Perplexity: that of `selectune eval` on the first blocks of wikitext-2, and exp of the mean of -log p over the same
tokens, from the whole logits of one block at a time in float64. Generation: the first rows of WebNLG, each way once a
round, in turns. Seconds of CPU are the process's own, so other work on the machine adds little to them. Needs
`pip install 'selectune[hf]'` and requirements/lm.txt for `smollm`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from selectune import tasks
from selectune.models.bases import LoadedModel, load_model
from selectune.models.evaluate import evaluate

PARTS = ("perplexity", "generation")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm")
    parser.add_argument("--data", default=None, help="a folder of tasks; by default SELECTUNE_DATA")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(given)
    loaded = load_model(options.model, tasks.get("text/wikitext2").head, 0)
    loaded.model.eval()
    told = {part: globals()[part](loaded, options) for part in PARTS if options.only in (None, part)}
    print(json.dumps(told, indent=2))
    return 0


def perplexity(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    task = tasks.get("text/wikitext2")
    examples = tasks.load(task, "validation", options.data).examples
    rows = task.encode(loaded.tokenizer, examples, options.length)[: options.blocks]
    found = evaluate(loaded.model, loaded.tokenizer, task, rows).value
    losses: list[float] = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            log_p = loaded.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            losses += (-log_p.gather(1, ids[0, 1:, None])[:, 0]).tolist()
    direct = math.exp(math.fsum(losses) / len(losses))
    return {"tokens": len(losses), "selectune": found, "direct": direct, "relative difference": abs(found / direct - 1)}


def generation(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    task = tasks.get("nlg/webnlg")
    examples = tasks.load(task, "validation", options.data, options.rows).examples
    ways = {"in batches": options.batch, "one by one": 1}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    scores = {}
    for _ in range(options.rounds):
        for name, batch in ways.items():
            kind = dataclasses.replace(task.kind, batch=batch, max_new_tokens=options.tokens)  # pyright: ignore
            way = dataclasses.replace(task, kind=kind)
            rows = way.encode(loaded.tokenizer, examples, 512)
            wall, cpu = time.perf_counter(), time.process_time()
            scores[name] = evaluate(loaded.model, loaded.tokenizer, way, rows)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rate = {
        name: {
            "rows a second": round(len(examples) / statistics.median(wall for wall, _ in times), 3),
            "seconds of CPU": round(statistics.median(cpu for _, cpu in times), 2),
            scores[name].metric: scores[name].value,
        }
        for name, times in seconds.items()
    }
    batches, single = (rate[name]["seconds of CPU"] for name in ways)
    return {"rows": len(examples), **rate, "times as fast, by CPU": round(single / batches, 2)}


if __name__ == "__main__":
    sys.exit(main())
