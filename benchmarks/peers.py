"""Further peers of `selectune bench`: methods of selective-optimizers 0.4 from PyPI, unchanged, and a mask high up.

`benchmarks/bars.py` and `benchmarks/gpu.py` measure them. Needs `pip install 'selectune[bench]'`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import selectune as st
from selectune.bench.meter import wait
from selectune.bench.methods import LEARNING_RATE, Conditions, Peer, Ready
from selectune.bench.workload import Bench, loss_of
from selectune.schedule import resolve_budget
from selectune.train import attach


def toolkit(kind: str) -> Callable[[nn.Module, Conditions], Ready]:
    def start(model: nn.Module, given: Conditions) -> Ready:
        wrap = importlib.import_module("selective_optimizers.wrap")
        store = importlib.import_module("selective_optimizers.load_store")
        budget = resolve_budget(given.budget, sum(p.numel() for p in model.parameters()))
        more: dict[str, Any] = {"max_steps": given.steps, "eps": 1.0, "exp": 2.0} if kind == "id3" else {}
        cls = wrap.get_selective_optimizer(torch.optim.AdamW, kind)
        with contextlib.redirect_stdout(sys.stderr):
            optimizer = cls(reached(model), lr=LEARNING_RATE, budget=budget, verify=False, **more)
        ready = Ready(optimizer, optimizer.get_budget_used, lambda folder: 0)
        ready.note = "verify=False: its copy of all weights on disk is left out"
        update, device = optimizer.update_chosen, next(model.parameters()).device.type

        def timed() -> None:
            began = time.perf_counter()
            update()
            wait(device)
            ready.select_s.append(time.perf_counter() - began)

        def save(folder: Path) -> int:
            store.write_summary_to_disk(str(folder / "summary.pt"), optimizer.get_summary(model))
            return (folder / "summary.pt").stat().st_size

        if kind == "id3":
            optimizer.update_chosen = timed
            ready.selecting = lambda: True
        ready.save = save
        return ready

    return start


def reached(model: nn.Module) -> list[nn.Parameter]:
    """The toolkit asks for a gradient of every parameter it is given; those that never get one are left out."""
    unused = getattr(model, "_bench_unreached", set())
    return [p for name, p in model.named_parameters() if name not in unused]


def note_unreached(model: nn.Module, batch: dict[str, Tensor], bench: Bench) -> None:
    """Runs one backward pass and remembers which parameters get no gradient in it."""
    loss_of(model, {name: tensor[:1] for name, tensor in batch.items()}, bench).backward()
    model._bench_unreached = {n for n, p in model.named_parameters() if p.grad is None}  # pyright: ignore
    model.zero_grad(set_to_none=True)


def top_third(model: nn.Module, given: Conditions) -> Ready:
    """A random mask of selectune in the upper third of the layers, so that backward may end where they begin."""
    prefix, stack = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    first = len(stack) - max(1, len(stack) // 3)
    upper = tuple(f"{prefix}.{i}.*" for i in range(first, len(stack)))
    tuner = attach(model, st.random(given.budget, scope=upper), seed=given.seed)
    return Ready(
        torch.optim.AdamW(tuner.parameters(), lr=given.rate),
        selected=lambda: tuner.selected,
        save=lambda folder: tuner.save(folder / "delta.safetensors", order=False).stat().st_size,
        undo=tuner.detach,
        model=model,
        tuner=tuner,
    )


PEERS = {
    f"toolkit-{kind}": Peer(toolkit(kind), "selective-optimizers", note_unreached) for kind in ("id3", "pafi", "bitfit")
}
PEERS["top-third"] = Peer(top_third, dense=False)
