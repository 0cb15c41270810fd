"""ID3's step on real gradients: MiniLM on STS-B, methods taking turns batch by batch in one process.

    SELECTUNE_DATA=... python benchmarks/real_gradients.py --steps 60

prints the processor time of a step over that of the frozen floor (forward and input gradients), and the entries that
bounds leave for exact scores. Every method has its own copy of the model, sees the same batches, and trains with AdamW;
the fresh head is trained whole. `id3, dense` is ID3 with the bounds turned off. Needs `pip install 'selectune[hf]'`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

import selectune as st
from selectune import tasks
from selectune.models.bases import load_model
from selectune.ops import bounds
from selectune.train.choose import products

TASK, BUDGET, RATE, WHOLE = "glue/stsb", 38_612, 5e-4, ("classifier.*",)


class Candidates:
    """Counts what bounds leave, and how often the dense product was the better way."""

    def __init__(self) -> None:
        self.left = self.entries = self.bounded = self.dense = 0
        self._real = products.above

    def __call__(self, factors: Any, weight: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        found = self._real(factors, weight, *rest)
        if found is None:
            self.dense += 1
        else:
            self.bounded += 1
            self.left += found.numel()
            self.entries += weight.numel()
        return found


def made(name: str, seed: int) -> tuple[Any, torch.optim.Optimizer | None, Any]:
    """A model of its own, its optimizer and tokenizer."""
    loaded = load_model("demo", tasks.get(TASK).head, seed)
    model = loaded.model.train()
    if name == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        return model, None, loaded.tokenizer
    if name == "full":
        return model, torch.optim.AdamW(model.parameters(), lr=2e-5), loaded.tokenizer
    method = {
        "static": st.random(BUDGET, train_fully=WHOLE),
        "id3": st.id3(BUDGET, 720, train_fully=WHOLE),
        "id3, dense": st.id3(BUDGET, 720, train_fully=WHOLE),
        "id3, every 10": st.id3(BUDGET, 720, every=10, train_fully=WHOLE),
    }[name]
    tuner = st.attach(model, method, seed=seed)
    return model, torch.optim.AdamW(tuner.parameters(), lr=RATE), loaded.tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ["frozen", "static", "id3", "id3, dense", "id3, every 10", "full"]
    runs = {name: made(name, options.seed) for name in names}
    tokenizer = runs["id3"][2]
    rows = tasks.get(TASK).encode(tokenizer, tasks.load(tasks.get(TASK), "train").examples, 128)
    took: dict[str, list[float]] = {name: [] for name in names}
    counted, pays = Candidates(), bounds.pays
    products.above = counted
    for step in range(options.steps):
        first = (step * options.batch) % (len(rows) - options.batch)
        batch = tasks.get(TASK).kind.collate(tokenizer, rows[first : first + options.batch])
        for name in names:
            model, optimizer, _ = runs[name]
            bounds.pays = (lambda t, o, i: False) if name == "id3, dense" else pays
            products.above = counted if name == "id3" else counted._real
            began = time.process_time()
            model(**batch).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            took[name].append(time.process_time() - began)
    warm = max(5, options.steps // 10)
    floor = took["frozen"][warm:]
    lines = ["| method | seconds a step, median | over frozen, median of ratios |", "|---|---|---|"]
    for name in names:
        ratios = [mine / frozen for mine, frozen in zip(took[name][warm:], floor, strict=True)]
        lines.append(f"| {name} | {statistics.median(took[name][warm:]):.3f} | {statistics.median(ratios):.2f} |")
    share = 100 * counted.left / max(1, counted.entries)
    served = f"{counted.bounded} of {counted.bounded + counted.dense}"
    lines.append(f"\nBounds served {served} tensors and left {share:.4f} % of their entries.")
    lines.append(f"{options.steps} steps of {options.batch} rows, {options.threads} threads, seed {options.seed}.")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
