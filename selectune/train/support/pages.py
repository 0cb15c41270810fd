"""The pages of the ledger: which entries of one tensor are trained, in which slots, and their base values."""

from __future__ import annotations

import torch
from torch import Tensor

from selectune.train.support.rectangles import Rectangles, rectangles


class Spots:
    """Entries of one tensor."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat  # (n,) int64, ascending, on the weight's device
        self._coordinates: tuple[Tensor, Tensor] | None = None
        self._rectangles: tuple[Rectangles | None] | None = None

    def coordinates(self, width: int) -> tuple[Tensor, Tensor]:
        """Rows (n,) and columns (n,), int32, of the entries in a tensor of this width; computed once."""
        if self._coordinates is None:
            self._coordinates = ((self.flat // width).int(), (self.flat % width).int())
        return self._coordinates

    def rectangles(self, width: int) -> Rectangles | None:
        """The entries as rectangles in a tensor of this width, None if they are scattered; found once."""
        if self._rectangles is None:
            self._rectangles = (rectangles(self.flat, width),)
        return self._rectangles[0]


class Page(Spots):
    """The ledger of one tensor: n selected and r retired entries. Never changed, only replaced."""

    def __init__(
        self,
        flat: Tensor,
        slot: Tensor,  # (n,) int64 into `offsets`, on its device
        base: Tensor,  # (n,) the weight's dtype
        retired: Tensor,  # (r,) int64, ascending, disjoint from flat
        retired_base: Tensor,  # (r,)
        watched: Spots | None = None,  # entries outside the support whose gradients are formed too
    ) -> None:
        super().__init__(flat)
        self.slot, self.base, self.watched = slot, base, watched
        self.retired, self.retired_base = retired, retired_base

    @staticmethod
    def empty(dtype: torch.dtype, device: torch.device, home: torch.device) -> Page:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return Page(none, none.to(home), none.to(dtype), none, none.to(dtype))

    def to(self, device: torch.device, home: torch.device) -> Page:
        on_device = (part.to(device) for part in (self.flat, self.base, self.retired, self.retired_base))
        flat, base, retired, retired_base = on_device
        watched = None if self.watched is None else Spots(self.watched.flat.to(device))
        return Page(flat, self.slot.to(home), base, retired, retired_base, watched)

    def watch(self, flat: Tensor | None) -> Page:
        """The same page with these entries watched, or none."""
        spots = None if flat is None else Spots(flat)
        return Page(self.flat, self.slot, self.base, self.retired, self.retired_base, spots)

    def touched(self) -> tuple[Tensor, Tensor]:
        """Flat indices (n + r,), ascending, and base values of all entries that may differ from the base."""
        if self.retired.numel() == 0:
            return self.flat, self.base
        flat, order = torch.sort(torch.cat((self.flat, self.retired)))
        return flat, torch.cat((self.base, self.retired_base))[order]
