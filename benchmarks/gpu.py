"""All that is measured on a GPU, in one call of under eight minutes: `python benchmarks/gpu.py --out gpu.json`.

DeBERTa-v3-base at batch 16 x 256, under bf16 autocast and in fp32, and a llama of 1.2 billion parameters in
bf16 at 2048 tokens: full fine-tuning, the frozen floor, LoRA, static masks and ID3, side by side, with the
bars judged, and with what share of the device's own ceilings (a large product, a large copy) a step reaches.
Needs `pip install 'selectune[hf,bench]'`. Without a GPU it says so and ends with code 3.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import bars
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import selectune as st
from selectune.bench.rounds import Settings
from selectune.bench.workload import DTYPES, Bench, batches, config_of, prepare

METHODS = ("full", "frozen", "lora", "pafi", "static-d3", "id3", "id3:every=10")
SHAPES = ((2048, 2048, 2048), (2048, 8192, 2048), (4096, 4096, 4096))  # tokens, outputs, inputs
CASES = (
    ("deberta-v3-base, bf16 autocast", Bench("deberta-v3-base", 16, 256, "fp32", "bf16", device="cuda")),
    ("deberta-v3-base, fp32", Bench("deberta-v3-base", 16, 256, "fp32", device="cuda")),
    ("llama-1b, bf16, 2048 tokens", Bench("llama-1b", 1, 2048, "bf16", device="cuda")),
)


def seconds(work, times: int = 10) -> float:
    """The median time of some work on the device."""
    took = []
    for _ in range(times + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return sorted(took[3:])[times // 2]


def ceilings() -> dict[str, float]:
    """What this device does at best: TFLOP/s of a large product, GB/s of a large copy."""
    found = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{name}_tflops"] = 2 * 8192**3 / seconds(lambda a=a, b=b: a @ b) / 1e12
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    found["copy_gbs"] = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source)) / 1e9
    return found


def flops(bench: Bench, frozen: bool) -> int:
    """FLOPs of the products of one step, forward and backward, counted on shapes alone."""
    config = config_of(bench.model)
    model = prepare(bench, config, "meta")
    cpu = Bench(bench.model, bench.batch, bench.length)
    batch = {name: tensor.to("meta") for name, tensor in batches(cpu, config, 1)[0].items() if name != "attention_mask"}
    labels = batch.pop("labels")
    if frozen:
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.requires_grad_(True))
    with FlopCounterMode(display=False) as counter:
        model(**batch).logits.sum().backward()
    del labels
    return counter.get_total_flops()


def reached(report: dict, bench: Bench, best: dict[str, float]) -> list[str]:
    """A line a method: FLOPs over time, against the measured ceiling."""
    try:
        counted = {"full": flops(bench, False), "frozen": flops(bench, True)}
    except (RuntimeError, NotImplementedError) as error:
        return [f"FLOPs could not be counted on shapes: {' '.join(str(error).split())[:160]}"]
    ceiling = best[f"{bench.autocast or bench.dtype}_tflops"]
    lines = []
    for row in report["rows"]:
        if row["error"] is not None:
            continue
        dense = row["method"] in ("full", "id3")
        done = counted["full" if dense else "frozen"] / row["step_s"] / 1e12
        row["tflops"], row["tflops_over_ceiling"] = done, done / ceiling
        lines.append(f"{row['method']:<12} {done:8.1f} TFLOP/s of {ceiling:.0f} ({done / ceiling:.0%})")
    return lines


def waits(depth: int, width: int = 512) -> int:
    """How often torch sees the host wait for the device in one selecting step of a stack of linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).cuda()
    tuner = st.attach(model, st.id3(budget=width * depth, steps=4))
    optimizer = st.SparseAdamW(tuner.parameters(), lr=1e-3)
    for step in range(3):
        x = torch.randn(64, width, device="cuda")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step == 2 else "default")
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def candidates(t: int, o: int, i: int, device: str = "cuda", best: int = 64) -> dict[str, float]:
    """The best entries of a gradient by D3, in milliseconds: tile by tile from its factors, and out of the dense one.

    Operands are random with heavy tails, as real ones are: most rows and columns have small norms.
    """
    from selectune.ops.triton import product_filter

    torch.manual_seed(0)
    dy, x = (torch.randn(t, n, device=device) * torch.rand(n, device=device) ** 4 for n in (o, i))
    weight = torch.randn(o, i, device=device) / 50

    def dense() -> torch.Tensor:
        return ((dy.mT @ x).abs_() / (weight.abs() + 1).square_()).view(-1).topk(best).values

    cutoff, found = dense()[-1], {}
    for dtype in (torch.float32, torch.bfloat16):
        half = dy.to(dtype), x.to(dtype)
        left = int(product_filter(*half, weight, 2.0, 1.0, cutoff, room=1 << 14)[2])
        took = seconds(lambda half=half: product_filter(*half, weight, 2.0, 1.0, cutoff, room=1 << 14))
        found |= {f"{dtype}".removeprefix("torch."): 1e3 * took, f"left, {dtype}".replace("torch.", ""): left}
    return {"dense and top-k": 1e3 * seconds(dense), **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu.json", help="JSON file for everything measured")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.0017)
    parser.add_argument("--limit", type=float, default=440.0, help="seconds after which no further case is started")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here: torch.cuda.is_available() is False. Nothing was measured.", file=sys.stderr)
        return 3
    began, found, kept = time.monotonic(), {"ceilings": ceilings(), "cases": []}, True
    torch.cuda.empty_cache()
    print("ceilings: " + ", ".join(f"{name} {value:,.0f}" for name, value in found["ceilings"].items()))
    found["waits"] = {depth: waits(depth) for depth in (4, 16)}
    print(
        "the host waited, in one selecting step: " + ", ".join(f"{n}x in {d} layers" for d, n in found["waits"].items())
    )
    found["candidates"] = {f"{t} x {o} x {i}": candidates(t, o, i) for t, o, i in SHAPES}
    for shape, row in found["candidates"].items():
        print(f"candidates of {shape}, ms: " + ", ".join(f"{way} {value:,.2f}" for way, value in row.items()))
    longest = 0.0
    for name, bench in CASES:
        started = time.monotonic()
        if started - began + longest > args.limit:
            print(f"\n{name}: not started, {started - began:.0f} s of {args.limit:.0f} s are gone")
            kept = False
            continue
        settings = Settings(bench, METHODS, args.budget, args.steps, args.rounds, timeout=240.0)
        report, fine = bars.judged(settings)
        report["name"], kept = name, kept and fine
        print("\n".join(reached(report, bench, found["ceilings"])))
        found["cases"].append(report)
        found["seconds"] = time.monotonic() - began
        Path(args.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        longest = max(longest, time.monotonic() - started)
    print(f"\n{time.monotonic() - began:.0f} s; written to {args.out}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
