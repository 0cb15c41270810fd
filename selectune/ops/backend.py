"""The choice of an implementation, and its reason.

`SELECTUNE_BACKEND` forces one: reference (plain torch), numba, triton, or dense (the dense product for
the sampled gradient, plain torch for the rest).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selectune import internals, seeds
from selectune.errors import ConfigError
from selectune.ops import cost, reference
from selectune.ops.cpu import kernels as cpu

log = logging.getLogger("selectune")

BACKENDS = ("reference", "numba", "triton", "dense")
VARIABLE = "SELECTUNE_BACKEND"
PLAIN = (
    "small_filter",
    "checksum",
)  # on a GPU: one runs before training, one is a kernel already
CHANGES = {"scatter_values": (0,), "adamw_step": (0, 2, 3, 4)}  # arguments that a kernel writes behind autograd's back


def implementation(op: str, device: str) -> Callable[..., Any]:
    """The function that torch calls for this op on this kind of device; it looks up the backend at every call."""

    def implementation(*args: Any) -> Any:
        return run(op, device, *args)

    implementation.__name__ = f"{op}_{device}"
    return implementation


def run(op: str, device: str, *args: Any) -> Any:
    """Run this op with autocast off, and tell autograd which arguments it changed."""
    with torch.autocast(device, enabled=False):  # the caller chooses the dtypes
        answer = find(op, device)(*args)
    for index in CHANGES.get(op, ()):
        changed = args[index]
        if isinstance(changed, Tensor) and not changed.is_inference():
            torch.autograd.graph.increment_version(changed)
    return answer


def find(op: str, device: str) -> Callable[..., Any]:
    """The function that computes this op on this kind of device at present."""
    name = forced() or _own(device)
    if name == "dense":
        return dense if op == "sampled_matmul" else getattr(reference, op)
    if name == "numba" and device == "cpu":
        if op == "sampled_matmul":
            return tuned
        return getattr(cpu, op)
    if name == "triton" and op not in PLAIN:
        if op == "sampled_matmul" and device == "cuda" and not forced():
            return tuned_cuda
        return getattr(_triton(), op)
    return dense if op == "sampled_matmul" and not forced() else getattr(reference, op)


def compiled() -> bool:
    """Whether compiled loops run on the CPU at present."""
    return (forced() or _own("cpu")) == "numba"


def forced() -> str | None:
    """The backend that the environment asks for."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if name not in BACKENDS:
        raise ConfigError(f"{VARIABLE}={name} is no backend. Known: {', '.join(BACKENDS)}.")
    if name in ("numba", "triton") and importlib.util.find_spec(name) is None:
        raise ConfigError(f"{VARIABLE}={name} asks for a package that is not installed: pip install {name}.")
    _say(name)
    return name


def tuned(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The sampled gradient on the CPU, computed in the cheapest way according to the cost model."""
    way = cost.choose(rows.numel(), dy.shape[0], dy.shape[1], x.shape[1], dy.dtype)
    if way == "dense" and forced() == "numba":
        way = "tiles"
    return {"gather": cpu.gather, "tiles": cpu.tiles, "dense": dense}[way](dy, x, rows, cols)


def tuned_cuda(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The sampled gradient on a GPU: its matrix units make the dense product cheap, so only few entries are sampled."""
    way = cost.choose(rows.numel(), dy.shape[0], dy.shape[1], x.shape[1], dy.dtype, "cuda")
    return (dense if way == "dense" else _triton().sampled_matmul)(dy, x, rows, cols)


def dense(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The whole product, then its entries; half operands are multiplied into float32."""
    return reference.product(dy, x).view(-1)[rows.long() * x.shape[1] + cols]


def scatter_many(
    one: Callable[..., None],
    weights: Sequence[Tensor],
    flats: Sequence[Tensor],
    values: Tensor,
    slots: Sequence[Tensor],
) -> None:
    """All weights in one launch if the loops run, or else one after the other by `one`."""
    everything = (values, *weights, *flats, *slots)
    if (
        not all(part.device.type == "cpu" for part in everything)
        or find("scatter_values", "cpu") is not cpu.scatter_values
    ):
        for weight, flat, slot in zip(weights, flats, slots, strict=True):
            one(weight, flat, values, slot)
        return
    rest = cpu.scatter_many([w.detach() for w in weights], flats, values.detach(), slots)
    for index in rest:
        one(weights[index], flats[index], values, slots[index])
    torch.autograd.graph.increment_version([w for w in weights if not w.is_inference()])


def checksum(tensor: Tensor, at: Tensor | None = None) -> int:
    """One integer over all bits and their places, see `reference.checksum`; it is faster on the CPU."""
    return find("checksum", tensor.device.type)(tensor, at)


def uniform(like: Tensor, stream: seeds.Stream, out: Tensor | None = None) -> Tensor:
    """`seeds.uniform`: the same numbers on every backend and device, written into `out` if it fits."""
    if internals.is_fake(like):
        return torch.empty_like(like) if out is None else out
    numba = like.device.type == "cpu" and (forced() or _own("cpu")) == "numba"
    return (cpu if numba else seeds).uniform(like, stream, out)


def explain() -> str:
    """One sentence on the backend in use."""
    name = forced()
    if name:
        return f"{name}, because {VARIABLE} says so"
    return "numba loops on the CPU" if _numba() else "dense products and torch gathers (numba is not installed)"


def describe() -> dict[str, Any]:
    """A report for people on this machine's backends and threads, and on the choices of the cost model.

    >>> sorted(describe())
    ['backends', 'choices', 'forced', 'threads']
    """
    from selectune.ops.cpu import threads

    def package(name: str, why: str) -> dict[str, Any]:
        found = importlib.util.find_spec(name) is not None
        return {"installed": found, "use": why if found else f"{name} is not installed"}

    gpu = "CUDA kernels" if torch.cuda.is_available() else "no CUDA device here; the kernels run interpreted in tests"
    shapes = [(768, 768), (3072, 768), (768, 3072), (4096, 4096)]
    return {
        "forced": forced(),
        "backends": {
            "reference": {"installed": True, "use": "the truth in plain torch; any device"},
            "numba": package("numba", "loops on the CPU"),
            "triton": package("triton", gpu),
        },
        "threads": {"count": torch.get_num_threads(), "pool": threads.describe()},
        "choices": [
            {
                "shape": [o, i],
                "tokens": 1024,
                "density": d,
                "way": cost.choose(int(d * o * i), 1024, o, i, torch.float32),
            }
            for o, i in shapes
            for d in (0.0001, 0.0005, 0.0017, 0.01, 0.05, 0.2)
        ],
    }  # fmt: skip


def _own(device: str) -> str:
    """The backend of a device if none is forced."""
    if device == "cpu":
        return "numba" if _numba() else "plain"
    return "triton" if importlib.util.find_spec("triton") is not None else "plain"


@functools.cache
def _say(name: str) -> None:
    log.info("%s=%s: every op runs on this backend.", VARIABLE, name)


@functools.cache
def _triton() -> Any:
    return importlib.import_module("selectune.ops.triton")


@functools.cache
def _numba() -> bool:
    if importlib.util.find_spec("numba") is None:
        log.warning("numba is not installed: sparse gradients on the CPU fall back to dense products.")
        return False
    return True
