"""What this installation is, what it uses and why, and a proof in a second that it works."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import selectune
from selectune import ops
from selectune.bench.meter import available
from selectune.errors import SelectuneError
from selectune.recipes import id3
from selectune.train import attach

PACKAGES = (
    "torch", "numpy", "safetensors", "numba", "triton", "transformers", "accelerate", "datasets", "peft", "trl",
    "selective-optimizers",
)  # fmt: skip
CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "SELECTUNE_DATA")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def examine() -> dict[str, Any]:
    """Everything `selectune doctor` says, as plain JSON values; "ok" is the self-check's verdict."""
    check = self_check()
    return {
        "ok": check["ok"],
        "selectune": selectune.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": devices(),
        "backend": backend(),
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count(), **_environment(THREADS)},
        "caches": _environment(CACHES),
        "self_check": check,
    }


def devices() -> list[dict[str, Any]]:
    """The CPU, and every GPU that torch sees."""
    free = available()
    found: list[dict[str, Any]] = [
        {"device": "cpu", "cores": os.cpu_count(), "free_mib": None if free is None else free >> 20}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found.append(
                {"device": f"cuda:{index}", "name": about.name, "memory_mib": about.total_memory >> 20,
                 "bf16": torch.cuda.is_bf16_supported()}
            )  # fmt: skip
    return found


def backend() -> Any:
    """Which kernels run, and why."""
    describe = getattr(ops, "describe", ops.explain)
    return describe()


def self_check() -> dict[str, Any]:
    """Attach, train, verify, save, detach, apply and revert on a small model; base, delta and revert by bits."""
    began = time.perf_counter()
    try:
        changed = _prove()
    except (SelectuneError, RuntimeError, ArithmeticError, OSError, ImportError) as error:
        return {
            "ok": False,
            "problem": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            "changed": None,
        }
    return {"ok": True, "problem": None, "changed": changed, "seconds": round(time.perf_counter() - began, 2)}


def _prove() -> int:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
        batches = [torch.randn(16, 64) for _ in range(4)]
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuner = attach(model, id3(budget=40, steps=4))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = tuner.verify()
    if found.selected != 40 or not 0 < found.changed <= 40:
        raise SelectuneError(f"Of a budget of 40, {found.selected} were selected and {found.changed} changed.")
    with tempfile.TemporaryDirectory() as folder:
        tuner.save(folder)
        tuner.detach()
        _same(model, base, "detach")
        delta = selectune.load(Path(folder))
    with delta.applied(model):
        differ = sum(int((tensor != base[name]).sum()) for name, tensor in model.state_dict().items())
    if differ != found.changed:
        raise SelectuneError(f"The delta changes {differ} scalars, the run changed {found.changed}.")
    _same(model, base, "revert")
    return found.changed


def _same(model: torch.nn.Module, base: dict[str, torch.Tensor], after: str) -> None:
    moved = [n for n, t in model.state_dict().items() if bool((ops.bits(t) != ops.bits(base[n])).any())]
    if moved:
        raise SelectuneError(f"After {after}, {', '.join(moved)} are not the base's, bit for bit.")


def described(value: dict[str, Any], indent: str = "") -> list[str]:
    """Nested plain values as lines of text."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}", *described(item, indent + "  ")]
        elif isinstance(item, list) and item and all(isinstance(i, dict) for i in item):
            lines.append(f"{indent}{key}")
            lines += [indent + "  " + ", ".join(f"{k} {v}" for k, v in i.items() if v is not None) for i in item]
        else:
            shown = "not set" if item is None else "yes" if item is True else "no" if item is False else item
            lines.append(f"{indent}{key:<22} {shown}")
    return lines


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _environment(names: tuple[str, ...]) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}
