"""Randomness as a hash of seeds and positions, so that it is the same on every device and in any order.

The hash is splitmix64: Steele, Lea, Flood (2014), Fast Splittable Pseudorandom Number Generators, OOPSLA, figure 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Bits of a number in [0, 1): as many as the dtype has below 1, so that no number is rounded up to 1."""

_MASK = (1 << 64) - 1


def mixed(*parts: int) -> int:
    """One seed from several numbers; neighbours give seeds far apart.

    >>> hex(mixed(0))
    '0xe220a8397b1dcdaf'
    """
    x = 0
    for part in parts:
        x = (x + part + STEP) & _MASK
        x = ((x ^ (x >> 30)) * FIRST) & _MASK
        x = ((x ^ (x >> 27)) * SECOND) & _MASK
        x ^= x >> 31
    return x


def signed(number: int) -> int:
    """64 bits as an int64, in which torch's tensors wrap around."""
    return (number & _MASK) - ((number & (1 << 63)) << 1)


def finish(x: Tensor) -> Tensor:
    """The last part of the hash, on int64 numbers that wrap around; the shifts treat them as unsigned."""
    for shift, factor in ((30, FIRST), (27, SECOND)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@dataclass
class Stream:
    """A sequence of numbers in [0, 1): number k is the hash of key + (k + 1) STEP. `at`: how many are drawn."""

    key: int
    at: int = 0

    def take(self, count: int) -> int:
        """Moves on by `count` numbers; returns the index of the first."""
        first, self.at = self.at, self.at + count
        return first


def uniform(like: Tensor, stream: Stream, out: Tensor | None = None) -> Tensor:
    """The next numbers of a stream in a tensor's shape and dtype, in row-major order; written to `out` if possible.

    >>> [round(x, 4) for x in uniform(torch.empty(3), Stream(0)).tolist()]
    [0.8833, 0.4315, 0.0264]
    """
    first, bits = stream.take(like.numel()), BITS[like.dtype]
    at = torch.arange(first + 1, first + 1 + like.numel(), device=like.device)
    numbers = (finish(at * signed(STEP) + signed(stream.key)) >> (64 - bits)) & ((1 << bits) - 1)
    made = (numbers.to(torch.float64) if bits == 53 else numbers.to(torch.float32)) * 2.0**-bits
    made = made.to(like.dtype).view(like.shape)
    return out.copy_(made) if out is not None and out.is_contiguous() else made
