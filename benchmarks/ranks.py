"""Several processes: what a selecting step sends between them, and the memory of each.

    python benchmarks/ranks.py --ranks 2,4,8 --steps 12 --json docs/performance/ranks.json

trains MiniLM by ID3 on rows of STS-B in several gloo processes (DistributedDataParallel), each on batches of its own,
and counts what each gives to collectives. In a ring of P processes an all-reduce of n bytes sends 2 n (P - 1)/P of
each, a reduce-scatter half of that, and an all-gather n (P - 1). Needs `pip install 'selectune[demo]'` and the task's
rows (SELECTUNE_DATA).

    python benchmarks/ranks.py --memory --ranks 2 --json docs/performance/ranks-memory-2.json

trains a BERT with random weights on random tokens by each method, under DistributedDataParallel and, with 2 processes,
under FSDP2, and reads the most memory that each process held (its resident set), beyond what it held before the model
was there: weights included. Beside it stands what `selectune plan --ranks` predicts. Needs `selectune[hf]`, peft for
LoRA, and Linux, which alone tells a process its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import selectune as st
from selectune.bench import methods
from selectune.bench.estimate import plan
from selectune.bench.meter import MIB, Memory
from selectune.bench.worker import rehearse
from selectune.bench.workload import Bench, batches, config_of, load_real, loss_of, prepare, real_batches
from selectune.cli.values import budget as budget_of
from selectune.errors import ConfigError
from selectune.schedule import resolve_budget

METHODS = "full,frozen,pafi,id3,lora:r=8"  # PaFi: a static mask, chosen by the weights' magnitudes
SHARDED = 2  # processes that are measured under FSDP2 too


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


def joined(rank: int, ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)


def spread(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs `work(rank, ranks, file, *args, answers)` in so many processes: what each of them put into `answers`."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        asked = (ranks, str(Path(folder) / "meeting"), *args, answers)
        processes = [context.Process(target=work, args=(rank, *asked)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found = [answers.get(timeout=1800) for _ in processes]
        for process in processes:
            process.join()
    return found


# -- bytes that are sent


def train(rank: int, ranks: int, file: str, batch: int, steps: int, budget: int | float, answers: Any) -> None:
    """One process: the bytes of each step, without those of the offsets' gradient."""
    joined(rank, ranks, file)
    bench = Bench("demo", batch, data="real")
    torch.manual_seed(bench.seed)
    loaded = load_real(bench)
    model = loaded.model
    found = real_batches(bench, loaded.tokenizer, steps * ranks)[rank::ranks]
    count = resolve_budget(budget, sum(p.numel() for p in model.parameters()))
    tuner = st.attach(model, st.id3(count, steps=steps))
    around = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=5e-4)
    sent: list[float] = [0.0]
    counted(sent, ranks)
    for rows in found[:steps]:
        loss_of(around, rows, bench).backward()
        optimizer.step()
        optimizer.zero_grad()
        sent.append(0.0)
    scalars = sum(p.numel() for p in model.parameters())
    answers.put((sent[:steps], scalars))
    dist.barrier()
    dist.destroy_process_group()


def traffic(ranks: int, given: argparse.Namespace) -> dict[str, Any]:
    """One number of processes."""
    found = spread(ranks, train, given.batch, given.steps, given.budget)
    sent = [max(step) for step in zip(*(steps for steps, _ in found), strict=True)]
    whole = 2 * (ranks - 1) / ranks * 4 * found[0][1]
    return {
        "ranks": ranks, "scalars": found[0][1], "whole_mib": whole / (1 << 20),
        "median_mib": statistics.median(sent) / (1 << 20), "largest_mib": max(sent) / (1 << 20),
        "median_share": statistics.median(sent) / whole, "steps": given.steps, "batch": given.batch,
    }  # fmt: skip


def told_of_traffic(found: dict[str, Any]) -> str:
    return (
        f"{found['ranks']} processes: a selecting step sends {found['median_mib']:.1f} MiB in the median, "
        f"{found['largest_mib']:.1f} at most; one all-reduce of all {found['whole_mib']:.1f} "
        f"({found['median_share']:.3f} of it)"
    )


# -- memory that is held


def held(
    rank: int, ranks: int, file: str, way: str, method: str, bench: Bench, steps: int, budget: int | float, answers: Any
) -> None:
    """One process: the MiB it held beyond those before it had a model, as it began and at most in all its steps."""
    torch.set_num_threads(1)
    rehearse(method, bench)  # libraries and kernels are not the model's
    joined(rank, ranks, file)
    dist.all_reduce(torch.ones(1 << 10))
    config = config_of(bench.model)
    rows = batches(Bench(bench.model, bench.batch, bench.length, seed=bench.seed + rank), config, steps)
    meter = Memory(bench.device)
    if not meter.exact:
        raise ConfigError("This system does not tell a process the most memory it held (/proc/self/clear_refs).")
    before = meter.now()
    model = prepare(bench, config)
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
        for block in model.get_submodule("bert.encoder.layer").children():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    meter.reset()
    loaded = meter.now() - before
    ready = methods.set_up(method, model, methods.Conditions(budget, steps, bench.seed, rows))
    around = ready.model or model
    if way == "ddp" and ready.optimizer is not None:  # it refuses a model of which nothing is trained
        around = DistributedDataParallel(around)
    started = meter.peak() - before
    meter.reset()
    for batch in rows:
        loss_of(around, batch, bench).backward()
        if ready.optimizer is not None:
            ready.optimizer.step()
            ready.optimizer.zero_grad()
    answers.put({"loaded": loaded / MIB, "started": started / MIB, "peak": (meter.peak() - before) / MIB})
    dist.barrier()
    dist.destroy_process_group()


def memory(ranks: int, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One number of processes: a row for each method, of the process that held most; medians over the repeats."""
    for way in ("ddp", "fsdp") if ranks == SHARDED else ("ddp",):
        named = [name for name in given.methods.split(",") if way == "ddp" or not name.startswith("lora")]
        full: float | None = None
        for method in sorted(named, key=lambda name: name != methods.DENSE):  # full fine-tuning first
            row = memory_row(ranks, way, method, given)
            full = row["peak_mib"] if method == methods.DENSE else full
            yield row | {"over_full": None if full is None else row["peak_mib"] / full}


def memory_row(ranks: int, way: str, method: str, given: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(given.model, given.batch, given.length)
    asked = (way, method, bench, given.steps, given.budget)
    runs = [spread(ranks, held, *asked) for _ in range(given.repeats)]
    most = [max(run, key=lambda one: one["peak"]) for run in runs]
    peaks = [one["peak"] for one in most]
    said = plan(bench, method, given.budget, given.steps, ranks=ranks) if way == "ddp" else None  # it plans replicas
    return {
        "ranks": ranks, "way": way, "method": method, "model": given.model, "batch": given.batch,
        "length": given.length, "steps": given.steps, "budget": given.budget, "repeats": given.repeats,
        **{f"{key}_mib": statistics.median(one[key] for one in most) for key in most[0]},
        "spread_mib": max(peaks) - min(peaks), "planned_mib": None if said is None else said.peak / MIB,
    }  # fmt: skip


def told_of_memory(found: dict[str, Any]) -> str:
    planned = "" if found["planned_mib"] is None else f", planned {found['planned_mib']:,.0f}"
    ratio = "" if found["over_full"] is None else f" ({found['over_full']:.2f} of full)"
    return (
        f"{found['ranks']} processes, {found['way']:<4} {found['method']:<8} held at most {found['peak_mib']:,.0f} MiB"
        f"{ratio}{planned}; the model {found['loaded_mib']:,.0f}, at the start at most {found['started_mib']:,.0f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--batch", type=int, default=16, help="rows of each process")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--budget", type=budget_of, default=0.0017)
    parser.add_argument("--memory", action="store_true", help="measure memory, and not the bytes that are sent")
    parser.add_argument("--model", default="bert-6l", help="whose memory is measured: a name of `selectune bench`")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row whose memory is measured")
    parser.add_argument("--methods", default=METHODS, help="whose memory is measured")
    parser.add_argument("--repeats", type=int, default=3, help="runs whose median is the memory")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for ranks in (int(text) for text in given.ranks.split(",")):
        for found in memory(ranks, given) if given.memory else [traffic(ranks, given)]:
            rows.append(found)
            print(told_of_memory(found) if given.memory else told_of_traffic(found), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
