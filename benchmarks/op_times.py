"""Times every op against plain torch and the dense product: `python benchmarks/op_times.py`.

Ways are interleaved round by round in one process, so that their ratios hold on a busy machine too;
the fastest round of each counts. `--cpu-time` takes the processor time of one thread instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from selectune import ops
from selectune.ops import backend, cost, reference
from selectune.ops.cpu import kernels as cpu

DENSITIES = (0.0005, 0.0017, 0.005, 0.02, 0.05, 0.1)


def measure(ways: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each way, the fastest of interleaved rounds."""
    best = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        way()  # compiles
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way()
            best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def show(title: str, times: dict[str, float], base: str) -> None:
    cells = "  ".join(f"{name} {t:8.2f} ms ({t / times[base]:5.2f})" for name, t in times.items())
    print(f"{title:28s} {cells}", flush=True)


def sampled(arguments: argparse.Namespace, dtype: torch.dtype, clock: Callable[[], float]) -> None:
    t, o, i = arguments.tokens, arguments.outputs, arguments.inputs
    dy, x = torch.randn(t, o).to(dtype), torch.randn(t, i).to(dtype)
    print(f"\nsampled_matmul, {i} -> {o}, {t} tokens, {dtype}; in brackets: over the dense product and its entries")
    for density in DENSITIES:
        flat = torch.randperm(o * i)[: int(density * o * i)].sort().values
        entries = flat // i, flat % i
        ways: dict[str, Callable[[], object]] = {
            "dense": lambda e=entries: backend.dense(dy, x, *e),
            "tiles": lambda e=entries: cpu.tiles(dy, x, *e),
        }
        if density <= 0.005:
            if dtype is torch.float32:
                ways["gather"] = lambda e=entries: cpu.gather(dy, x, *e)
            ways["torch"] = lambda e=entries: reference.sampled_matmul(dy, x, *e)
        times = measure(ways, arguments.rounds, clock)
        show(f"density {density:.2%} ({flat.numel()})", times, "dense")
        print(f"{'':28s} chosen: {cost.choose(flat.numel(), t, o, i, dtype)}")


def passes(arguments: argparse.Namespace, clock: Callable[[], float]) -> None:
    o, i = arguments.outputs, arguments.inputs
    n = o * i
    w, g = torch.randn(n), torch.randn(n)
    copy = torch.empty(n)
    print(f"\none pass over {n} weights; in brackets: over a copy of the weights")
    for exp in (0.0, 1.0, 2.0, 0.7):
        scores = reference.score(w, g, exp, 1.0)
        cutoff = float(scores.kthvalue(n - n // 500).values)
        ways: dict[str, Callable[[], object]] = {
            "copy": lambda: copy.copy_(w),
            "score_filter": lambda e=exp, c=cutoff: ops.score_filter(w, g, e, 1.0, c),
            "torch": lambda e=exp, c=cutoff: reference.score_filter(w, g, e, 1.0, c),
        }
        show(f"score_filter, exp {exp}", measure(ways, arguments.rounds, clock), "copy")
    k = 320_000
    flat, slots, values = torch.randperm(n)[:k].sort().values, torch.randperm(k), torch.randn(k)
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.zeros(n, dtype=dtype)
        ways = {
            "torch": lambda a=target: reference.scatter_values(a, flat, values, slots),
            "scatter_values": lambda a=target: ops.scatter_values(a, flat, values, slots),
        }
        show(f"{k} values to {dtype}", measure(ways, arguments.rounds, clock), "torch")
    vectors = [torch.randn(k), torch.randn(k), torch.zeros(k), torch.zeros(k)]
    ages = torch.ones(k, dtype=torch.int32)
    numbers = {"step": 1000, "lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    ways = {
        "torch": lambda: reference.adamw_step(*vectors, None, 1000, 1e-4, 0.9, 0.999, 1e-8, 0.0),
        "adamw_step": lambda: ops.adamw_step(*vectors, None, **numbers),
        "adamw_step with ages": lambda: ops.adamw_step(*vectors, ages, **numbers),
    }
    show(f"AdamW of {k}", measure(ways, arguments.rounds, clock), "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--inputs", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="time one thread's own work; implies --threads 1")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    for name in arguments.dtypes.split(","):
        sampled(arguments, getattr(torch, name), clock)
    passes(arguments, clock)


if __name__ == "__main__":
    main()
