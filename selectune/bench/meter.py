"""Meters of one process: seconds of work on a device, memory that it holds, and what selections took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import resource
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from selectune.internals import TorchDispatchMode, tree_iter
from selectune.ops.bounds import Factors
from selectune.select import GlobalCollector
from selectune.train import Tuner
from selectune.train.choose.products import Offered

MIB = 1 << 20
TIE = 1e-12  # relative: scores in float64 that are nearer to each other may change places
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """Bytes that are held: the process's resident set on the CPU, the allocator's count on CUDA.

    Where the system cannot reset the peak, `peak` is that of the whole process and `exact` is False.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.exact = self.cuda or _reset_peak()

    def now(self) -> int:
        """Bytes that are held now, after unused memory was given back."""
        gc.collect()
        if self.cuda:
            return torch.cuda.memory_allocated()
        give_back()
        return _status("VmRSS")

    def reset(self) -> None:
        """Starts counting `peak` anew."""
        self.now()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            _reset_peak()

    def peak(self) -> int:
        """The most bytes that were held since `reset`."""
        return torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")

    def reserved(self) -> int | None:
        """The most bytes that CUDA's caching allocator had taken; None on the CPU."""
        return torch.cuda.max_memory_reserved() if self.cuda else None

    def rest(self) -> None:
        """Gives back what an idle process does not need."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        else:
            give_back()


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live.

    `known`: storages that are there already, by address. They are kept alive, because a new storage that took the
    address of a freed one would go uncounted.
    """

    def __init__(self, known: Mapping[int, UntypedStorage]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known, self._seen = dict(known), set(known)  # addresses of what is alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def wait(device: str) -> None:
    """Waits until the device has done all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def copy_seconds(model: nn.Module, device: str, times: int = 3) -> float:
    """The median time of a pass over the weights: all are copied into memory that is there already."""
    weights = [p.detach() for p in model.parameters()]
    copies: list[Tensor] = [w.clone() for w in weights]
    took = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        for target, source in zip(copies, weights, strict=True):
            target.copy_(source)
        wait(device)
        took.append(time.perf_counter() - began)
    return sorted(took)[len(took) // 2]


def give_back() -> None:
    """Asks the C library to return free memory to the system, where it can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available() -> int | None:
    """Bytes of memory that new processes can use; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        limit = Path("/sys/fs/cgroup/memory.max")
        used = Path("/sys/fs/cgroup/memory.current")
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        if limit.exists() and limit.read_text("ascii").strip().isdigit():
            free = min(free, int(limit.read_text("ascii")) - int(used.read_text("ascii")))
    except (OSError, StopIteration, ValueError):
        return None
    return free


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5", "ascii")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    try:
        lines = _STATUS.read_text("ascii").splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


class Selections:
    """What bounds left of linear weights' gradients, step by step, and whether float64 selects the same."""

    def __init__(self, tuner: Tuner, compare: int = 0) -> None:
        """`compare`: every how many selecting steps are compared; 0: none."""
        self._chooser, self._compare = tuner.engine.chooser, compare
        self._chooser.products.report = self._offered
        self._steps, self._offers, self._oracle = 0, list[Offered](), list[tuple[Tensor, Tensor]]()
        self.spent = 0.0  # seconds of comparisons in the present step

    def _offered(self, one: Offered, factors: Factors) -> None:
        self._offers.append(one)
        if self._compare == 0 or self._steps % self._compare:
            return
        began = time.perf_counter()
        gradient = factors.dy.double().mT @ factors.x.double()
        scores = self._chooser.score(one.tensor.parameter.detach().double().view(-1), gradient.view(-1))
        padding = one.tensor.padding
        scores[padding.start : padding.stop] = -math.inf
        if one.taken is not None:
            scores[one.taken] = -math.inf
        quota = min(one.collector.of(one.tensor.index).quota, scores.numel())
        best = scores.topk(quota)
        self._oracle.append((best.values, best.indices))
        self.spent += time.perf_counter() - began

    def close(self) -> dict[str, Any] | None:
        """What the present step's selection took; None if it had none whose gradients came as products."""
        offers, oracle, self._offers, self._oracle, self.spent = self._offers, self._oracle, [], [], 0.0
        if not offers:
            return None
        self._steps += 1
        bounded = [one for one in offers if one.candidates is not None]
        return {
            "tensors": len(offers),
            "bounded": len(bounded),
            "entries": sum(one.tensor.parameter.numel() for one in offers),
            "candidates": sum(one.candidates or 0 for one in bounded),
            "dense_entries": sum(one.tensor.parameter.numel() for one in offers if one.candidates is None),
            "equal": self._equal(offers, oracle) if oracle else None,
        }

    def _equal(self, offers: Sequence[Offered], oracle: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Whether the entries that were selected of these tensors are the best by float64, up to ties of it."""
        chosen = []
        for one in offers:
            page = self._chooser.ledger.pages[one.tensor.index]
            flat = page.flat if page.watched is None else page.watched.flat
            chosen.append(flat if one.taken is None else flat[~torch.isin(flat, one.taken)])
        shared = isinstance(offers[0].collector, GlobalCollector)
        groups = [range(len(offers))] if shared else [range(k, k + 1) for k in range(len(offers))]
        for group in groups:
            scores = torch.cat([oracle[k][0] for k in group])
            picked = torch.cat([torch.isin(oracle[k][1], chosen[k]) for k in group])
            count = sum(chosen[k].numel() for k in group)
            if int(picked.sum()) != count:
                return False  # one that was selected is not among any tensor's best
            if 0 < count < scores.numel() and scores[picked].min() < scores[~picked].max() * (1 - TIE):
                return False
        return True
