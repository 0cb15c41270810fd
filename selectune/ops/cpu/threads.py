"""Runs a compiled loop on torch's own threads.

A loop is a C function of one pointer. It claims blocks of work from an atomic counter until none is left, so any number
of threads may call it. The threads are those of torch's OpenMP pool (`GOMP_parallel` of the library that torch has
loaded). numba's own pool would wait for torch's idle threads, which spin for 10 ms after every matrix product. If torch
runs on another OpenMP, ordinary threads do the work.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import glob
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

log = logging.getLogger("selectune")

SLOTS = 32  # int64 arguments of a loop; the first is the address of the counter

_LOOP = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def launch(loop: int, arguments: Sequence[int], blocks: int) -> None:
    """Call the loop at this address on as many threads as torch uses, at most one per block of work."""
    counter = np.zeros(8, np.int64)
    packed = np.zeros(SLOTS, np.int64)
    packed[0] = counter.ctypes.data
    packed[1 : 1 + len(arguments)] = arguments
    threads = max(1, min(torch.get_num_threads(), blocks))
    parallel = None if threads == 1 else _openmp()
    if threads == 1:
        _LOOP(loop)(packed.ctypes.data)
    elif parallel is not None:
        parallel(loop, packed.ctypes.data, threads, 0)
    else:
        pool = _pool(os.getpid(), threads)
        done = [pool.submit(_LOOP(loop), packed.ctypes.data) for _ in range(threads - 1)]
        _LOOP(loop)(packed.ctypes.data)
        for one in done:
            one.result()


@functools.cache
def _openmp() -> Any:
    """GOMP_parallel of the OpenMP library that torch itself uses, or None."""
    flag = getattr(os, "RTLD_NOLOAD", None)
    if flag is None:
        return None
    for path in glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libgomp*.so*")):
        try:
            parallel = ctypes.CDLL(path, mode=flag | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError) as error:
            log.debug("No GOMP_parallel in %s: %s.", os.path.basename(path), error)
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    log.debug("torch runs on no GNU OpenMP of its own: loops use ordinary threads.")
    return None


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """One pool per process: a forked child has none of its parent's threads."""
    del process
    return concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="selectune")


def describe() -> str:
    """How loops run on several threads here."""
    return "torch's OpenMP threads" if _openmp() is not None else "ordinary threads"
