"""A support that consists of whole rectangles, some rows by some columns: its gradient is a few small dense products.

Whole rows, columns, blocks, heads and subnets are rectangles; the unit that is trained in part is one or two more.
Rows with the same columns make one rectangle, so the cover is exact and no entry is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selectune import ops
from selectune.bits import wide

Indices = slice | Tensor
ALWAYS, SMALLEST = 2, 1024  # how many rectangles a support may have: so many, and one for every so many entries
NARROW = 4  # an input is cut if this many cuts take no more memory than all of it: query, key and value share theirs


@dataclass(frozen=True)
class Rectangle:
    """Rows of dy, columns of what is kept of x, and the places of the entries, row by row, in the support."""

    rows: Indices
    columns: Indices
    places: Indices


@dataclass(frozen=True)
class Rectangles:
    """All entries (n,) of a support; `columns`: the only ones that are kept of an input, None if it is kept whole."""

    entries: int
    columns: Tensor | None
    parts: tuple[Rectangle, ...]

    def kept(self, x: Tensor) -> Tensor:
        """What the gradient needs of an input (..., i)."""
        return x if self.columns is None else x.index_select(-1, self.columns)

    def gradient(self, dy: Tensor, kept: Tensor) -> Tensor:
        """The entries (n,) of dy^T x, for dy (t, o) and what was kept of x (t, i), in float32 or float64."""
        common = torch.promote_types(dy.dtype, kept.dtype)
        dy, kept = dy.to(common), kept.to(common)
        found = dy.new_empty(self.entries, dtype=wide(common))
        for part in self.parts:
            found[part.places] = ops.product(_columns(dy, part.rows), _columns(kept, part.columns)).view(-1)
        return found


def rectangles(flat: Tensor, width: int) -> Rectangles | None:
    """The rectangles that flat indices (n,), ascending, make in a matrix of this width; None if they are scattered.

    >>> found = rectangles(torch.tensor([1, 3, 9, 11]), 4)
    >>> found.parts[0].rows, found.parts[0].columns
    (tensor([0, 2]), tensor([1, 3]))
    """
    rows, columns = flat // width, flat % width
    used, counts = torch.unique_consecutive(rows, return_counts=True)
    starts = counts.cumsum(0) - counts
    of_row = torch.repeat_interleave(torch.arange(used.numel(), device=flat.device), counts)
    drawn = torch.randint(-(1 << 62), 1 << 62, (width,), generator=torch.Generator().manual_seed(0))
    sums = torch.zeros_like(used).index_add_(0, of_row, drawn.to(flat.device)[columns])
    different, group = torch.unique(sums, return_inverse=True)
    if flat.numel() == 0 or different.numel() > ALWAYS + flat.numel() // SMALLEST:
        return None
    needed = torch.unique(columns)
    narrow = needed.numel() * NARROW <= width
    parts = []
    for number in range(different.numel()):
        mine = (group == number).nonzero()[:, 0]
        count = int(counts[mine[0]])
        if not bool((counts[mine] == count).all()):
            return None
        places = starts[mine, None] + torch.arange(count, device=flat.device)
        theirs = columns[places]
        if not bool((theirs == theirs[0]).all()):  # different columns, and the same sum of drawn numbers
            return None
        inside = torch.searchsorted(needed, theirs[0]) if narrow else theirs[0]
        parts.append(Rectangle(_short(used[mine]), _short(inside), _short(places.reshape(-1))))
    return Rectangles(flat.numel(), needed if narrow else None, tuple(parts))


def _short(indices: Tensor) -> Indices:
    """A slice in place of indices that follow one another."""
    first, count = int(indices[0]), indices.numel()
    one_by_one = torch.arange(first, first + count, device=indices.device)
    return slice(first, first + count) if torch.equal(indices, one_by_one) else indices


def _columns(matrix: Tensor, which: Indices) -> Tensor:
    return matrix[:, which] if isinstance(which, slice) else matrix.index_select(1, which)
