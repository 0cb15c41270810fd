"""The overlap of deltas: scalars that several of them write, and those where their differences disagree in sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from selectune.delta.combine.aligned import Rows, align, as_deltas, check_shapes
from selectune.delta.delta import Delta


@dataclass(frozen=True)
class Overlap:
    """Sizes of two supports and of their intersection; `tensors` has the same for each tensor that either writes."""

    first: int
    second: int
    shared: int
    tensors: dict[str, Overlap]

    @property
    def ratio(self) -> float:
        """|A n B| / |A|; 0 where A is empty."""
        return self.shared / self.first if self.first else 0.0

    @property
    def jaccard(self) -> float:
        """|A n B| / |A u B|; 0 where both are empty."""
        union = self.first + self.second - self.shared
        return self.shared / union if union else 0.0


@dataclass(frozen=True)
class Conflicts:
    """Scalars that several deltas write, and how many of them one delta raises and another lowers."""

    written: int  # scalars that any delta writes
    shared: int  # scalars that at least two write
    opposed: int  # shared scalars with a difference above 0 and another below
    tensors: dict[str, Conflicts]  # the same for each tensor with shared scalars

    @property
    def totals(self) -> dict[str, int]:
        """The three numbers, as a merge records them."""
        return {"written": self.written, "shared": self.shared, "opposed": self.opposed}


def overlap(first: Delta, second: Delta) -> Overlap:
    """How much of one support lies in the other: |A n B| / |A| and Jaccard, for each tensor and in all.

    A parameter that is recorded whole counts with all its entries, a zeroed patch with those that it lists; buffers do
    not count. The bases may differ, so two runs with their own heads can be compared; only shapes must agree
    (BaseMismatchError). O(B).

    >>> from selectune.delta import Delta, Patch, base_info
    >>> info = {"base": base_info(torch.nn.Linear(4, 1))}
    >>> def of(*at):
    ...     zeros = torch.zeros(len(at))
    ...     return Delta([Patch.make("weight", (1, 4), torch.tensor(at), zeros, zeros)], [], info)
    >>> overlap(of(0, 1, 2), of(2, 3)).ratio, overlap(of(0, 1, 2), of(2, 3)).jaccard
    (0.3333333333333333, 0.25)
    """
    deltas = as_deltas([first, second])
    check_shapes(deltas)
    sides = [
        {**d.support, **{e.name: torch.arange(e.tensor.numel()) for e in d.dense if e.kind == "parameter"}}
        for d in deltas
    ]
    tensors = {}
    none = torch.zeros(0, dtype=torch.int64)
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        one, two = (side.get(name, none) for side in sides)
        tensors[name] = Overlap(one.numel(), two.numel(), int(torch.isin(one, two, assume_unique=True).sum()), {})
    rows = tensors.values()
    return Overlap(sum(r.first for r in rows), sum(r.second for r in rows), sum(r.shared for r in rows), tensors)


def conflicts(deltas: Sequence[Delta], *, base: nn.Module | None = None) -> Conflicts:
    """The conflicts that a merge of these deltas has to settle: shared scalars, and differences of opposite sign.

    Buffers do not count. Raises as `add` does.

    >>> from selectune.delta import Delta, Patch, base_info
    >>> model = torch.nn.Linear(4, 1)
    >>> def of(value, *at):
    ...     old = model.weight.detach()[0, list(at)]
    ...     return Delta([Patch.make("weight", (1, 4), torch.tensor(at), old + value, old)], [],
    ...                  {"base": base_info(model)})
    >>> conflicts([of(0.5, 0, 1, 2), of(-0.5, 2, 3), of(0.5, 1)], base=model).totals
    {'written': 4, 'shared': 2, 'opposed': 1}
    """
    return count_conflicts(align(as_deltas(deltas), base))


def count_conflicts(aligned: Sequence[Rows]) -> Conflicts:
    """The report from aligned tensors."""
    tensors: dict[str, Conflicts] = {}
    written = 0
    for rows in aligned:
        if rows.kind == "buffer":
            continue
        writers, change = rows.written.sum(0), rows.differences
        opposed = int(((change > 0).any(0) & (change < 0).any(0)).sum())
        mine = Conflicts(int((writers > 0).sum()), int((writers > 1).sum()), opposed, {})
        written += mine.written
        if mine.shared:
            tensors[rows.name] = mine
    found = tensors.values()
    return Conflicts(written, sum(c.shared for c in found), sum(c.opposed for c in found), tensors)
