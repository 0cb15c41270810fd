"""The checks of `selectune doctor`. Each looks at one thing, and a broken one does not stop the others.

`python -m selectune.doctor.checks JSON` runs them in a process of its own, which may die: it writes a line of JSON as
a check begins and one as it ends, which `selectune.doctor.examine` reads. Each check imports what it needs itself.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module, metadata, util
from pathlib import Path
from typing import IO, Any

NEEDED = ("torch", "numpy", "safetensors", "numba")
OPTIONAL = ("triton", "transformers", "accelerate", "datasets", "peft", "trl", "selective-optimizers")
CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "SELECTUNE_DATA")
WRITTEN = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR")  # what must take files where it is set
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
ABSENT = "not installed"


class Finding(Exception):
    """Something is wrong; the message says all of it."""


def attempt(look: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a check found, and what went wrong in it as one line.

    >>> attempt(lambda: 1 / 0)
    (None, 'ZeroDivisionError: division by zero')
    """
    try:
        return look(), None
    except Finding as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001 a broken package may raise anything, and doctor has to name it
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"


def parts(model: str | None = None) -> dict[str, Callable[[], Any]]:
    """All checks by name, in the order in which they run."""
    found: dict[str, Callable[[], Any]] = {
        "python": lambda: {"python": sys.version.split()[0]},
        **{f"variable {name}": lambda n=name: _threads(n) for name in THREADS},
        **{f"variable {name}": lambda n=name: _folder(n) for name in dict.fromkeys((*CACHES, *WRITTEN))},
        **{f"package {name}": lambda n=name: _package(n) for name in (*NEEDED, *OPTIONAL)},
        "devices": devices,
        "threads": lambda: {"torch": import_module("torch").get_num_threads(), "cores": os.cpu_count()},
        "backend": backend,
        "self-check": lambda: self_check("cpu"),
        "self-check on the GPU": on_gpu,
    }
    if model is not None:
        found[f"model {model}"] = lambda: _model(model)
    return found


def _threads(name: str) -> str | None:
    value = os.environ.get(name)
    if value is not None and not all(part.strip().isdigit() and int(part) > 0 for part in value.split(",")):
        raise Finding(f"it is '{value}', which is no number of threads. Set it to 1 or more, or unset it.")
    return value


def _folder(name: str) -> str | None:
    value = os.environ.get(name)
    if not value:
        return value
    place = Path(value).expanduser()
    if name not in WRITTEN:
        if place.exists() and not place.is_dir():
            raise Finding(f"{value} is not a folder.")
        if name == "SELECTUNE_DATA" and not place.exists():
            raise Finding(f"the folder {value} does not exist.")
        return value
    if not place.exists() and name == "TMPDIR":
        raise Finding(f"the folder {value} does not exist.")
    if not place.exists():
        place = next(parent for parent in place.absolute().parents if parent.exists())
    if not place.is_dir():
        raise Finding(f"{value} cannot be a folder: {place} is none.")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise Finding(f"nothing can be written in {value}: {error.strerror or error}.") from None
    return value


def _package(name: str) -> str:
    """The version of a package that can be imported."""
    module = name.replace("-", "_")
    if util.find_spec(module) is None:
        if name in NEEDED:
            raise Finding("it is not installed, and selectune needs it: pip install " + name)
        return ABSENT
    import_module(module)
    version = metadata.version(name)
    if not isinstance(version, str):
        raise Finding("its metadata names no version: install it again.")
    return version


def devices() -> list[dict[str, Any]]:
    """The CPU and every GPU that torch sees."""
    import torch

    from selectune.bench.meter import available

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


def backend() -> dict[str, Any]:
    """Which kernels run, and why they were chosen."""
    from selectune import ops

    return {"use": ops.explain(), **ops.describe()}


def on_gpu() -> dict[str, Any] | None:
    """The self-check on the first GPU; None where there is none."""
    import torch

    return self_check("cuda:0") if torch.cuda.is_available() else None


def self_check(device: str) -> dict[str, Any]:
    """Attaches, trains, verifies, saves, detaches, applies and reverts on a small model, and compares bits."""
    began = time.perf_counter()
    return {"changed": prove(device), "seconds": round(time.perf_counter() - began, 2)}


def prove(device: str = "cpu") -> int:
    """Does what `self_check` says and returns how many scalars training changed. Raises Finding if a bit is wrong."""
    import torch

    import selectune

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
        batches = [torch.randn(16, 64).to(device) for _ in range(4)]
    model.to(device)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuner = selectune.attach(model, selectune.id3(budget=40, steps=4))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = tuner.verify()
    if found.selected != 40 or not 0 < found.changed <= 40:
        raise Finding(f"of a budget of 40, {found.selected} were selected and {found.changed} changed.")
    with tempfile.TemporaryDirectory() as folder:
        tuner.save(folder)
        tuner.detach()
        _same(model, base, "detach")
        delta = selectune.load(Path(folder))
    with delta.applied(model):
        differ = sum(int((tensor != base[name]).sum()) for name, tensor in model.state_dict().items())
    if differ != found.changed:
        raise Finding(f"the delta changes {differ} scalars, the run changed {found.changed}.")
    _same(model, base, "revert")
    return found.changed


def _same(model: Any, base: dict[str, Any], after: str) -> None:
    from selectune import ops

    moved = [n for n, t in model.state_dict().items() if bool((ops.bits(t) != ops.bits(base[n])).any())]
    if moved:
        raise Finding(f"after {after}, {', '.join(moved)} are not the base's, bit for bit.")


def _model(model: str) -> dict[str, Any]:
    from selectune.doctor.candidate import look

    return look(model)


def answer(names: list[str], model: str | None, out: IO[str]) -> None:
    """Runs these checks and writes the lines about them."""
    known = parts(model)
    for name in names:
        out.write(json.dumps({"part": name}) + "\n")
        out.flush()
        value, problem = attempt(known[name])
        out.write(json.dumps({"part": name, "value": value, "problem": problem}, default=str) + "\n")
        out.flush()


def main() -> None:
    """Runs as a process: lines go to stdout, and whatever a library prints goes to stderr."""
    asked = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        answer(asked["parts"], asked["model"], out)


if __name__ == "__main__":
    main()
