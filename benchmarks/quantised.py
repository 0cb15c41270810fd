"""ID3 beside a quantised base against ID3 in full precision: the memory that training holds, and the loss it reaches.

    python benchmarks/quantised.py                        # the base in float32
    python benchmarks/quantised.py --quantise nf4

One run in one process, so that its memory is its own: `smollm` learns from blocks of a text and is measured on others.
The peak counts what the process holds beyond what it held before the model was loaded; it was loaded and dropped once
before that, so that libraries do not count. Loading is left out, since it goes through the base in float32. Set
MALLOC_MMAP_THRESHOLD_=131072, so that the C library hands back what is freed. Needs `pip install
'selectune[hf,quant]'`, requirements/lm.txt and SELECTUNE_DATA.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time

import torch

import selectune as st
from selectune import tasks
from selectune.bench.meter import Memory
from selectune.integrations.quantise import QUANTISED, quantise
from selectune.models.bases import load_model, quiet, resolve

MIB = 1 << 20
LETTERS = 60_000  # of each text that are read
BLOCKS = 4  # that are measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm")
    parser.add_argument("--quantise", choices=QUANTISED)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--task", default="text/english_novels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--budget", type=int, default=100_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--checkpointing", action="store_true", help="activations are computed again in backward")
    parser.add_argument("--exclude", default=None, help="a pattern of tensors that nothing is selected from")
    options = parser.parse_args()
    memory = Memory("cpu")
    task = tasks.get(options.task)
    load_model(options.model, task.head, 0, dtype=options.dtype)  # so that libraries count as held before,
    warm_up()  # and loops that are compiled
    gc.collect()
    before = memory.now()
    loaded = load_model(options.model, task.head, 0, dtype=options.dtype)
    texts = {split: tasks.load(task, split, None).examples[0].texts[0][:LETTERS] for split in ("train", "validation")}
    rows = {split: [tasks.Example((text,), None)] for split, text in texts.items()}
    with quiet():
        coded = {name: task.encode(loaded.tokenizer, part, options.length) for name, part in rows.items()}
    blocks = {name: [torch.tensor([row["input_ids"]]) for row in part] for name, part in coded.items()}
    model = loaded.model.eval()
    if options.quantise is not None:
        quantise(model, options.quantise, file=resolve(options.model).file)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # which drops nothing in such models, and without which layers are not computed again
    del loaded
    held = memory.now() - before
    start = loss_on(model, blocks["validation"][:BLOCKS])
    memory.reset()
    began = time.perf_counter()
    scope = st.Scope(exclude=options.exclude or ())
    tuner = st.attach(model, st.id3(budget=options.budget, steps=options.steps, scope=scope))
    optimizer = st.SparseAdamW(tuner.parameters(), lr=options.lr)
    for step in range(options.steps):
        ids = torch.cat(
            [blocks["train"][(step * options.batch + k) % len(blocks["train"])] for k in range(options.batch)]
        )
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds, peak = time.perf_counter() - began, memory.peak() - before
    told = {
        "quantise": options.quantise, "dtype": options.dtype, "steps": options.steps, "selected": tuner.selected,
        "batch": options.batch, "length": options.length, "exclude": options.exclude,
        "checkpointing": options.checkpointing,
        "base_mib": round(held / MIB), "peak_mib": round(peak / MIB), "process_mib": round((peak + before) / MIB),
        "seconds": round(seconds, 1), "loss_before": round(start, 4),
        "loss_after": round(loss_on(model, blocks["validation"][:BLOCKS]), 4), "unmoved": tuner.verify() is not None,
    }  # fmt: skip
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


def warm_up() -> None:
    tiny = torch.nn.Sequential(torch.nn.Embedding(8, 64), torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    tuner = st.attach(tiny, st.id3(budget=64, steps=4))
    optimizer = st.SparseAdamW(tuner.parameters())
    for _ in range(4):
        tiny(torch.arange(8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    tuner.detach()


@torch.no_grad()
def loss_on(model: torch.nn.Module, blocks: list[torch.Tensor]) -> float:
    return sum(float(model(input_ids=ids, labels=ids).loss) for ids in blocks) / len(blocks)


if __name__ == "__main__":
    sys.exit(main())
