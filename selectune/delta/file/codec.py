"""Strictly increasing indices as 16-bit gap words (docs/delta-format.md, "Gap code")."""

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
