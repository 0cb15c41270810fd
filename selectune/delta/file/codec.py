"""Strictly increasing indices as 16-bit gap words, and ranks as few bits each (docs/delta-format.md)."""

from __future__ import annotations

import numpy as np

from selectune.errors import DeltaFormatError

CONTINUE = 0xFFFF
"""This word adds 65535 to a gap, which continues in the next word. Every other word ends its gap."""


def encode_gaps(indices: np.ndarray) -> np.ndarray:
    """Code strictly increasing indices, int64 `(n,)`, as gap words, uint16 `(words,)`.

    A gap g = index - previous - 1 becomes floor(g / 65535) words 0xFFFF and the word g mod 65535.

    >>> encode_gaps(np.array([0, 1, 5, 65541])).tolist()
    [0, 0, 3, 65535, 0]
    """
    gaps = np.diff(indices, prepend=-1) - 1
    whole, rest = np.divmod(gaps, CONTINUE)
    ends = np.cumsum(whole + 1) - 1
    words = np.full(int(ends[-1]) + 1 if len(ends) else 0, CONTINUE, dtype="<u2")
    words[ends] = rest
    return words


def decode_gaps(words: np.ndarray, count: int, numel: int, name: str) -> np.ndarray:
    """Decode gap words, uint16 `(words,)`, into indices, int64 `(count,)`, below `numel`.

    Raises DeltaFormatError if the words do not hold exactly `count` indices, or if an index leaves the tensor.

    >>> decode_gaps(np.array([0, 0, 3, 65535, 0], dtype=np.uint16), 4, 70000, "w").tolist()
    [0, 1, 5, 65541]
    """
    ends = np.flatnonzero(words != CONTINUE)
    if len(ends) != count or (len(words) and ends[-1:].tolist() != [len(words) - 1]):
        raise DeltaFormatError(
            f'the indices of "{name}" cannot be read: their {len(words)} gap words hold {len(ends)} complete gaps; '
            f"expected {count}, and no word after the last gap"
        )
    indices = np.cumsum(words, dtype=np.int64)[ends] + np.arange(count, dtype=np.int64)
    if count and indices[-1] >= numel:
        raise DeltaFormatError(
            f'the indices of "{name}" leave the tensor: the last one is {indices[-1]}; it must be below {numel}'
        )
    return indices


def packed_ranks(ranks: np.ndarray, bits: int) -> np.ndarray:
    """Ranks `(n,)` below 2^bits as a stream of bits, uint8: `bits` for each, the lowest first, filled up with zeros.

    >>> packed_ranks(np.array([1, 5, 5]), 3).tolist()
    [105, 1]
    """
    rows = np.empty((len(ranks), bits), dtype=np.uint8)
    for bit in range(bits):
        rows[:, bit] = (ranks >> bit) & 1
    return np.packbits(rows, bitorder="little")


def unpacked_ranks(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Ranks, int32 `(count,)`, of a stream of bits. Raises DeltaFormatError for ranks that have another code.

    >>> unpacked_ranks(np.array([105, 1], dtype=np.uint8), 3, 3).tolist()
    [1, 5, 5]
    """
    rows = np.unpackbits(data, bitorder="little")
    ranks = np.zeros(count, dtype=np.int32)
    for bit in range(bits):
        ranks |= rows[bit : count * bits : bits].astype(np.int32) << bit
    if bits_of_ranks(ranks) != bits or rows[count * bits :].any():
        raise DeltaFormatError(
            f"the order of selection cannot be read: {bits} bits for each of {count} ranks is not their shortest code, "
            "or bits follow the last one"
        )
    return ranks


def bits_of_ranks(ranks: np.ndarray) -> int | None:
    """How many bits each rank takes in a stream of bits; None if all ranks differ, since these are stored as U32."""
    if len(np.unique(ranks)) == len(ranks):
        return None
    return max(1, int(ranks.max()).bit_length())
