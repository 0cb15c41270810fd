"""What a selecting step sends between processes, on real gradients: bytes on the wire, beside one all-reduce of all.

    python benchmarks/ranks.py --ranks 2,4,8 --steps 12 --json docs/performance/ranks.json

trains MiniLM by ID3 on rows of STS-B in several gloo processes (DistributedDataParallel), each on batches of its own,
and counts what each gives to collectives. In a ring of P processes an all-reduce of n bytes sends 2 n (P - 1)/P of
each, a reduce-scatter half of that, and an all-gather n (P - 1). Needs `pip install 'selectune[demo]'` and the task's
rows (SELECTUNE_DATA).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import selectune as st
from selectune.bench.workload import Bench, load_real, loss_of, real_batches
from selectune.cli.values import budget as budget_of
from selectune.schedule import resolve_budget


def counted(sent: list[float], ranks: int) -> None:
    """Lets every collective of this process add the bytes that it sends."""

    def watch(name: str, which: int, share: float) -> None:
        real = getattr(dist, name)

        def call(*args: Any, **more: Any) -> Any:
            tensor: Tensor = args[which]
            sent[-1] += share * tensor.numel() * tensor.element_size()
            return real(*args, **more)

        setattr(dist, name, call)

    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    watch("all_reduce", 0, 2 * (ranks - 1) / ranks)
    watch(scatter, 1, (ranks - 1) / ranks)
    watch("all_gather", 1, ranks - 1)


def train(rank: int, ranks: int, file: str, batch: int, steps: int, budget: int | float, answers: Any) -> None:
    """One process: the bytes of each step, without those of the offsets' gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    bench = Bench("demo", batch, data="real")
    torch.manual_seed(bench.seed)
    loaded = load_real(bench)
    model = loaded.model
    batches = real_batches(bench, loaded.tokenizer, steps * ranks)[rank::ranks]
    count = resolve_budget(budget, sum(p.numel() for p in model.parameters()))
    tuner = st.attach(model, st.id3(count, steps=steps))
    around = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=5e-4)
    sent: list[float] = [0.0]
    counted(sent, ranks)
    for rows in batches[:steps]:
        loss_of(around, rows, bench).backward()
        optimizer.step()
        optimizer.zero_grad()
        sent.append(0.0)
    scalars = sum(p.numel() for p in model.parameters())
    answers.put((sent[:steps], scalars))
    dist.barrier()
    dist.destroy_process_group()


def row(ranks: int, given: argparse.Namespace) -> dict[str, Any]:
    """One number of processes."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        asked = (ranks, str(Path(folder) / "meeting"), given.batch, given.steps, given.budget, answers)
        processes = [context.Process(target=train, args=(rank, *asked)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found = [answers.get(timeout=1800) for _ in processes]
        for process in processes:
            process.join()
    sent = [max(step) for step in zip(*(steps for steps, _ in found), strict=True)]
    whole = 2 * (ranks - 1) / ranks * 4 * found[0][1]
    return {
        "ranks": ranks, "scalars": found[0][1], "whole_mib": whole / (1 << 20),
        "median_mib": statistics.median(sent) / (1 << 20), "largest_mib": max(sent) / (1 << 20),
        "median_share": statistics.median(sent) / whole, "steps": given.steps, "batch": given.batch,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--batch", type=int, default=16, help="rows of each process")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--budget", type=budget_of, default=0.0017)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [row(int(ranks), given) for ranks in given.ranks.split(",")]
    for found in rows:
        print(
            f"{found['ranks']} processes: a selecting step sends {found['median_mib']:.1f} MiB in the median, "
            f"{found['largest_mib']:.1f} at most; one all-reduce of all {found['whole_mib']:.1f} "
            f"({found['median_share']:.3f} of it)"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
