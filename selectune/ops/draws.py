"""Numba loops over a stream of numbers: `seeds.uniform` in one pass, without a temporary."""

from __future__ import annotations

import numpy as np
from numba import njit

from selectune.seeds import FIRST, SECOND, STEP

_STEP, _FIRST, _SECOND = np.uint64(STEP), np.uint64(FIRST), np.uint64(SECOND)


@njit(inline="always")
def _hashed(key, at):  # type: ignore[no-untyped-def]
    x = key + np.uint64(at + 1) * _STEP
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


@njit
def uniform_float32(key, first, out):  # type: ignore[no-untyped-def]
    """Fills out (n,) float32 with numbers in [0, 1) of 24 bits."""
    for j in range(out.size):
        out[j] = np.float32(np.int64(_hashed(key, first + j) >> np.uint64(40))) * np.float32(2.0**-24)


@njit
def uniform_float64(key, first, out):  # type: ignore[no-untyped-def]
    """Fills out (n,) float64 with numbers in [0, 1) of 53 bits."""
    for j in range(out.size):
        out[j] = np.float64(np.int64(_hashed(key, first + j) >> np.uint64(11))) * 2.0**-53
