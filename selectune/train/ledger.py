"""The ledger: which entry of which tensor is trained in which slot, and what stood there before.

One trainable vector `values` (B,) holds the master value of every selected scalar, a slot each, in
order of selection. Per tensor the ledger keeps the sorted flat indices of its entries, their slots and
their base values; entries that were trained and then dropped (repeat schedules) stay listed as retired,
so that the base can be put back and the delta is complete. Index tensors are replaced, never changed in
place, so a snapshot is a tuple of references.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from selectune import ops
from selectune.errors import IntegrityError
from selectune.scope import ScopedTensor


class Page:
    """The ledger of one tensor, n selected and r retired entries. Never changed, only replaced."""

    def __init__(self, flat: Tensor, slot: Tensor, base: Tensor, retired: Tensor, retired_base: Tensor) -> None:
        self.flat = flat  # (n,) int64, ascending, on the weight's device
        self.slot = slot  # (n,) int64 into `values`, on its device
        self.base = base  # (n,) the weight's dtype
        self.retired = retired  # (r,) int64, ascending, disjoint from flat
        self.retired_base = retired_base  # (r,)
        self._coordinates: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def empty(weight: Tensor, home: torch.device) -> Page:
        none = torch.empty(0, dtype=torch.int64, device=weight.device)
        return Page(none, none.to(home), weight.new_empty(0), none, weight.new_empty(0))

    def to(self, device: torch.device, home: torch.device) -> Page:
        return Page(
            self.flat.to(device), self.slot.to(home), self.base.to(device),
            self.retired.to(device), self.retired_base.to(device),
        )  # fmt: skip

    def coordinates(self, width: int) -> tuple[Tensor, Tensor]:
        """Rows (n,) and columns (n,), int32, of the entries in a tensor of this width, kept once made."""
        if self._coordinates is None:
            self._coordinates = ((self.flat // width).int(), (self.flat % width).int())
        return self._coordinates

    def touched(self) -> tuple[Tensor, Tensor]:
        """Flat indices (n + r,), ascending, and base values of all that may differ from the base."""
        if self.retired.numel() == 0:
            return self.flat, self.base
        flat, order = torch.sort(torch.cat((self.flat, self.retired)))
        return flat, torch.cat((self.base, self.retired_base))[order]


Snapshot = tuple[list[Page], Tensor]


class Ledger:
    """All pages, and the one trainable vector they share."""

    def __init__(self, tensors: Sequence[ScopedTensor], capacity: int) -> None:
        self.tensors = tensors
        weights = [t.parameter.detach() for t in tensors]
        wide = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
        home = weights[0].device if weights else torch.device("cpu")
        self.values = nn.Parameter(torch.zeros(capacity, dtype=wide, device=home))
        self.dtypes = [w.dtype for w in weights]
        self.pages = [Page.empty(w, home) for w in weights]
        self.free = torch.arange(capacity, device=home)  # slots not in use, lowest first

    @property
    def selected(self) -> int:
        return self.values.numel() - self.free.numel()

    @property
    def touched(self) -> int:
        return self.selected + sum(p.retired.numel() for p in self.pages)

    def follow(self) -> None:
        """Moves the pages to where the weights went since, and sees that they kept their dtype."""
        home = self.values.device
        for index, (tensor, page) in enumerate(zip(self.tensors, self.pages, strict=True)):
            weight = tensor.parameter
            if weight.dtype != self.dtypes[index]:
                raise IntegrityError(
                    f'The dtype of "{tensor.name}" changed from {self.dtypes[index]} to {weight.dtype} while a tuner '
                    "is attached, so its base could not be restored. Cast the model before attach."
                )
            if page.flat.device != weight.device or page.slot.device != home:
                self.pages[index] = page.to(weight.device, home)
        self.free = self.free.to(home)

    # -- changing the support

    def add(self, tensors: Tensor, flat: Tensor) -> Tensor:
        """Gives the entries (tensors[k], flat[k]) the next free slots, in this order: slots (k,).

        A slot starts at its weight's present value.
        """
        slots, self.free = self.free[: flat.numel()], self.free[flat.numel() :]
        order = torch.argsort(tensors, stable=True)
        counts = torch.bincount(tensors, minlength=len(self.tensors)).tolist()
        parts = flat[order].split(counts), slots[order.to(slots.device)].split(counts)
        for index, (mine, places) in enumerate(zip(*parts, strict=True)):
            if mine.numel():
                self._insert(index, mine, places)
        return slots

    def replace(self, tensors: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Makes the support exactly these entries; those that were in it keep their slots.

        Returns which of the given entries are new, bool (k,), and the slots of those, in their order.
        """
        fresh = torch.ones(flat.numel(), dtype=torch.bool)
        for index, page in enumerate(self.pages):
            mine = tensors == index
            chosen = flat[mine].to(page.flat.device)
            fresh[mine] = torch.isin(chosen, page.flat, invert=True).cpu()
            self._retire(index, torch.isin(page.flat, chosen, invert=True))
        return fresh, self.add(tensors[fresh], flat[fresh])

    def _insert(self, index: int, flat: Tensor, slots: Tensor) -> None:
        page, weight = self.pages[index], self.tensors[index].parameter
        flat, order = torch.sort(flat.to(weight.device))
        slots = slots[order.to(slots.device)]
        base = ops.gather_entries(weight, flat)
        with torch.no_grad():
            self.values[slots] = base.to(self.values)
        back = torch.isin(page.retired, flat)
        if bool(back.any()):  # trained before: its base is the one recorded then
            base[torch.searchsorted(flat, page.retired[back])] = page.retired_base[back]
        merged, order = torch.sort(torch.cat((page.flat, flat)))
        self.pages[index] = Page(
            merged,
            torch.cat((page.slot, slots))[order.to(slots.device)],
            torch.cat((page.base, base))[order],
            page.retired[~back],
            page.retired_base[~back],
        )

    def _retire(self, index: int, drop: Tensor) -> None:
        page = self.pages[index]
        if not bool(drop.any()):
            return
        self.free = torch.sort(torch.cat((page.slot[drop.to(page.slot.device)], self.free))).values
        retired, order = torch.sort(torch.cat((page.retired, page.flat[drop])))
        base = torch.cat((page.retired_base, page.base[drop]))[order]
        keep = ~drop
        self.pages[index] = Page(page.flat[keep], page.slot[keep.to(page.slot.device)], page.base[keep], retired, base)

    # -- undoing a selection whose step was skipped

    def snapshot(self) -> Snapshot:
        return list(self.pages), self.free

    def restore(self, snapshot: Snapshot) -> None:
        """Puts pages back; slots they use again take their weight's present value, others 0."""
        self.pages, self.free = list(snapshot[0]), snapshot[1]
        with torch.no_grad():
            self.values[self.free] = 0
        self.read_weights(only_changed=True)

    # -- values <-> weights

    @torch.no_grad()
    def write_weights(self) -> None:
        """Casts every slot's value into its weight, in place: O(B)."""
        for tensor, page in zip(self.tensors, self.pages, strict=True):
            if page.flat.numel():
                weight, values, slot = tensor.parameter.detach(), self.values.detach(), page.slot
                if values.device != weight.device:
                    values, slot = values[slot].to(weight.device), torch.arange(len(slot), device=weight.device)
                ops.scatter_values(weight, page.flat, values, slot)

    @torch.no_grad()
    def read_weights(self, *, only_changed: bool) -> None:
        """Takes the weights' present values into the slots.

        `only_changed`: a slot whose value already casts to the weight's bits keeps its finer master value.
        """
        for tensor, page in zip(self.tensors, self.pages, strict=True):
            if page.flat.numel():
                weight = ops.gather_entries(tensor.parameter, page.flat)
                value = self.values.detach()[page.slot]
                if only_changed:
                    same = ops.bits(value.to(weight)) == ops.bits(weight)
                    weight = torch.where(same.to(value.device), value, weight.to(value))
                self.values[page.slot] = weight.to(self.values)

    def agrees(self) -> bool:
        """Whether every slot's value casts to the bits of its weight: no optimizer moved them since."""
        for tensor, page in zip(self.tensors, self.pages, strict=True):
            weight = tensor.parameter
            value = self.values.detach()[page.slot].to(weight)
            if not bool((ops.bits(value) == ops.bits(ops.gather_entries(weight, page.flat))).all()):
                return False
        return True

    @torch.no_grad()
    def write_base(self) -> None:
        """Puts the base value back at every touched entry, bit for bit."""
        for tensor, page in zip(self.tensors, self.pages, strict=True):
            ops.scatter_entries(tensor.parameter, *page.touched())

    def gather(self, pages: Sequence[Page], pieces: Sequence[Tensor | None]) -> Tensor:
        """One gradient (B,) out of the gradients (n,) of the tensors; slots without one get 0."""
        gradient = torch.zeros_like(self.values)
        for page, piece in zip(pages, pieces, strict=True):
            if piece is not None and piece.numel():
                gradient[page.slot] = piece.to(gradient)
        return gradient
