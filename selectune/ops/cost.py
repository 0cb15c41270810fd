"""What a sampled gradient costs, way by way: a small linear model, measured once per machine.

    gather   t k a                      few entries: nothing is turned
    tiles    t (o + i) b + t k c        operands turned in cache, one dot product per entry
    dense    t o i d                    the whole product, entries picked from it

`calibrate()` measures a, b, c, d and keeps them under the user's cache folder; without it the defaults
below hold. It takes the processor time of one thread, so other work on the machine hardly shows.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectune.errors import ConfigError
from selectune.files import read_json

log = logging.getLogger("selectune")

VERSION = 2
VARIABLE = "SELECTUNE_CALIBRATE"  # 0 = never measure by itself
FACTOR = 10  # how far a measurement is believed beyond the defaults
LARGE = 1 << 28  # multiplications of a dense product from which a measurement pays

# nanoseconds of one core per unit of the formulas above; "start" per call
DEFAULTS: dict[str, dict[str, float]] = {
    "float32": {"start": 60e3, "gather": 1.8, "turn": 0.5, "dot": 0.08, "dense": 0.013},
    "float64": {"start": 60e3, "gather": 2.2, "turn": 1.0, "dot": 0.16, "dense": 0.026},
    "half": {"start": 60e3, "gather": 1e9, "turn": 0.5, "dot": 0.08, "dense": 0.014},
    # a GPU by arithmetic: bytes of entries that are read one by one against the matrix units
    "cuda": {"start": 10e3, "gather": 1e9, "turn": 1e-3, "dot": 4e-3, "dense": 5e-6},
}


def choose(
    entries: int,
    tokens: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    measure: bool = True,
) -> str:
    """gather, tiles or dense: the cheapest by the model; `measure`: a large case may measure this machine first.

    >>> choose(4000, 1024, 768, 3072, torch.float32), choose(2_000_000, 1024, 768, 3072, torch.float32)
    ('tiles', 'dense')
    """
    measure = measure and device == "cpu" and tokens * outputs * inputs >= LARGE
    model = coefficients(measure=measure)[_family(dtype) if device == "cpu" else device]
    costs = estimate(model, entries, tokens, outputs, inputs)
    return min(costs, key=lambda way: costs[way])


def estimate(model: dict[str, float], entries: int, tokens: int, outputs: int, inputs: int) -> dict[str, float]:
    """Nanoseconds of every way on one core."""
    return {
        "gather": model["start"] + tokens * entries * model["gather"],
        "tiles": 2 * model["start"] + tokens * ((outputs + inputs) * model["turn"] + entries * model["dot"]),
        "dense": model["start"] / 4 + tokens * outputs * inputs * model["dense"],
    }


def coefficients(*, measure: bool = False) -> dict[str, dict[str, float]]:
    """The model of this machine: measured and cached, or the defaults. `measure`: measure if nothing is cached."""
    known = _read(path())
    if known is not None:
        return known
    if measure and os.environ.get(VARIABLE) != "0":
        return calibrate()
    return DEFAULTS


def calibrate() -> dict[str, dict[str, float]]:
    """Measures the CPU's ways in under two seconds, keeps the result, and returns it."""
    model = {name: dict(part) for name, part in DEFAULTS.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the work of one core; how much else runs on the others does not count then
    try:
        # float64 follows float32: its loops would have to be compiled for that
        for names, dtype in ((("float32", "float64"), torch.float32), (("half",), torch.bfloat16)):
            for key, value in _measure(dtype).items():
                ratio = min(max(value / DEFAULTS[names[0]][key], 1 / FACTOR), FACTOR)
                for name in names:
                    model[name][key] = DEFAULTS[name][key] * ratio
    finally:
        torch.set_num_threads(threads)
    try:
        _write(path(), model)
    except OSError as error:
        log.warning("The measured costs cannot be kept in %s (%s): this process uses them alone.", path(), error)
    _read.cache_clear()
    _memory[str(path())] = model
    log.info("Measured the costs of sampled gradients: %s", json.dumps(model["float32"]))
    return model


def describe() -> dict[str, Any]:
    """The model in use and where it is from."""
    known = _read(path())
    return {
        "source": "defaults" if known is None else "measured on this machine",
        "file": str(path()),
        "coefficients": DEFAULTS if known is None else known,
    }


def path() -> Path:
    """Where the measured model is kept."""
    return _path(os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))


@functools.cache
def _path(cache: str | None, home: str | None) -> Path:
    del home  # expanduser reads it
    return Path(cache or os.path.join(os.path.expanduser("~"), ".cache")) / "selectune" / f"cost-{VERSION}.json"


_memory: dict[str, dict[str, dict[str, float]]] = {}  # where no file can be written


@functools.cache
def _read(file: Path) -> dict[str, dict[str, float]] | None:
    if str(file) in _memory:
        return _memory[str(file)]
    if not file.exists():
        return None
    try:
        model = read_json(file, error=ConfigError)
    except ConfigError as error:
        log.warning("The measured costs cannot be used: %s The defaults are.", error)
        return DEFAULTS
    fine = isinstance(model, dict) and all(
        isinstance(model.get(name), dict)
        and all(isinstance(v := model[name].get(key), (int, float)) and 0 < v < 1e12 for key in part)
        for name, part in DEFAULTS.items()
    )
    if not fine:
        log.warning("The measured costs in %s are damaged: the defaults are used.", file)
        return DEFAULTS
    return model


def _write(file: Path, model: dict[str, dict[str, float]]) -> None:
    """The whole file or none, whoever else writes it now."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(model, out, indent=1)
        os.replace(temporary, file)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _family(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.float64: "float64"}.get(dtype, "half")


def _measure(dtype: torch.dtype) -> dict[str, float]:
    """Coefficients out of four calls on one layer of 768 x 768 at 512 tokens."""
    from selectune.ops import backend, cpu

    t, o, i = 512, 768, 768
    draw = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(t, n, generator=draw).to(dtype) for n in (o, i))

    def entries(count: int) -> tuple[Tensor, Tensor]:
        flat = torch.randperm(o * i, generator=draw)[:count].sort().values
        return flat // i, flat % i

    few, many = entries(600), entries(24_000)
    turn, full = (_seconds(lambda e=e: cpu.tiles(dy, x, *e)) for e in (few, many))
    dot = max(full - turn, 1e-9) / (t * (many[0].numel() - few[0].numel()))
    product = _seconds(lambda: backend.dense(dy, x, *few))
    measured = {
        "turn": max(turn - 600 * t * dot, 0.1 * turn) / (t * (o + i)),
        "dot": dot,
        "dense": product / (t * o * i),
    }
    if dtype is torch.float32:
        measured["gather"] = _seconds(lambda: cpu.gather(dy, x, *few)) / (t * few[0].numel())
    return {name: value * 1e9 for name, value in measured.items()}


def _seconds(call: Callable[[], object]) -> float:
    call()  # compiles
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
    return best
