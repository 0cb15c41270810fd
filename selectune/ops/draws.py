"""Numba loops that draw what torch's CPU generator draws, bit for bit, a tenth as long.

The generator is the Mersenne Twister, 624 words of 32 bits: Matsumoto, Nishimura (1998), Mersenne Twister, ACM
TOMACS 8(1), section 2.1. torch makes a float of the low 24 bits of a word, a double of the low 53 of two.
"""

from __future__ import annotations

import numpy as np
from numba import njit

WORDS = 624
APART = 397  # how far the word lies ahead that a word is mixed with
AT_ONCE = 2048  # words made before they become floats; even, so that no pair is split


@njit(inline="always")
def _mixed(word, after, ahead):  # type: ignore[no-untyped-def]
    y = (word & np.uint32(0x80000000)) | (after & np.uint32(0x7FFFFFFF))
    return ahead ^ (y >> np.uint32(1)) ^ (np.uint32(0x9908B0DF) * (y & np.uint32(1)))


@njit
def _refill(words):  # type: ignore[no-untyped-def]
    """The next 624 words in place: three stretches, none of which reads what it writes nearby."""
    for k in range(WORDS - APART):
        words[k] = _mixed(words[k], words[k + 1], words[k + APART])
    for k in range(WORDS - APART, WORDS - 1):
        words[k] = _mixed(words[k], words[k + 1], words[k + APART - WORDS])
    words[WORDS - 1] = _mixed(words[WORDS - 1], words[0], words[APART - 1])


@njit
def _temper(words, out):  # type: ignore[no-untyped-def]
    for j in range(out.size):
        y = words[j]
        y ^= y >> np.uint32(11)
        y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
        y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
        out[j] = y ^ (y >> np.uint32(18))


@njit
def _take(words, used, out):  # type: ignore[no-untyped-def]
    """The next words of the stream, `used` of the present 624 being gone; how many are gone then."""
    done = 0
    while done < out.size:
        if used == WORDS:
            _refill(words)
            used = 0
        count = min(WORDS - used, out.size - done)
        _temper(words[used : used + count], out[done : done + count])
        used += count
        done += count
    return used


@njit
def uniform_float32(words, used, out):  # type: ignore[no-untyped-def]
    """Fills out (n,) float32 with numbers in [0, 1), a word each."""
    made = np.empty(AT_ONCE, np.uint32)
    for first in range(0, out.size, AT_ONCE):
        part = out[first : first + AT_ONCE]
        used = _take(words, used, made[: part.size])
        for j in range(part.size):
            part[j] = np.float32(np.int32(made[j] & np.uint32(0xFFFFFF))) * np.float32(2.0**-24)
    return used


@njit
def uniform_float64(words, used, out):  # type: ignore[no-untyped-def]
    """Fills out (n,) float64 with numbers in [0, 1), two words each, the upper one first."""
    made = np.empty(AT_ONCE, np.uint32)
    for first in range(0, out.size, AT_ONCE // 2):
        part = out[first : first + AT_ONCE // 2]
        used = _take(words, used, made[: 2 * part.size])
        for j in range(part.size):
            upper = np.int64(made[2 * j] & np.uint32(0x1FFFFF))
            part[j] = np.float64((upper << 32) | np.int64(made[2 * j + 1])) * 2.0**-53
    return used
