"""The ledger: which entry of which tensor is trained in which slot, and what stood there before.

One trainable vector `values` (B,) holds the master value of every selected scalar, a slot each, in
order of selection. Per tensor the ledger keeps the sorted flat indices of its entries, their slots and
their base values; entries that were trained and then dropped (repeat schedules) stay listed as retired,
so that the base can be put back and the delta is complete. Index tensors are replaced, never changed in
place, so a snapshot is a tuple of references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selectune import ops
from selectune.errors import IntegrityError
from selectune.scope import ScopedTensor


class Spots:
    """Entries of one tensor."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat  # (n,) int64, ascending, on the weight's device
        self._coordinates: tuple[Tensor, Tensor] | None = None

    def coordinates(self, width: int) -> tuple[Tensor, Tensor]:
        """Rows (n,) and columns (n,), int32, of the entries in a tensor of this width, kept once made."""
        if self._coordinates is None:
            self._coordinates = ((self.flat // width).int(), (self.flat % width).int())
        return self._coordinates


class Page(Spots):
    """The ledger of one tensor, n selected and r retired entries. Never changed, only replaced."""

    def __init__(
        self,
        flat: Tensor,
        slot: Tensor,
        base: Tensor,
        retired: Tensor,
        retired_base: Tensor,
        *,
        watched: Spots | None = None,
    ) -> None:
        super().__init__(flat)
        self.slot = slot  # (n,) int64 into `values`, on its device
        self.base = base  # (n,) the weight's dtype
        self.retired = retired  # (r,) int64, ascending, disjoint from flat
        self.retired_base = retired_base  # (r,)
        self.watched = watched  # entries beside the selected ones whose gradients are formed too

    @staticmethod
    def empty(weight: Tensor, home: torch.device) -> Page:
        none = torch.empty(0, dtype=torch.int64, device=weight.device)
        return Page(none, none.to(home), weight.new_empty(0), none, weight.new_empty(0))

    def to(self, device: torch.device, home: torch.device) -> Page:
        return Page(
            self.flat.to(device), self.slot.to(home), self.base.to(device),
            self.retired.to(device), self.retired_base.to(device),
            watched=None if self.watched is None else Spots(self.watched.flat.to(device)),
        )  # fmt: skip

    def watch(self, flat: Tensor | None) -> Page:
        """The same page, these entries watched."""
        spots = None if flat is None else Spots(flat)
        return Page(self.flat, self.slot, self.base, self.retired, self.retired_base, watched=spots)

    def touched(self) -> tuple[Tensor, Tensor]:
        """Flat indices (n + r,), ascending, and base values of all that may differ from the base."""
        if self.retired.numel() == 0:
            return self.flat, self.base
        flat, order = torch.sort(torch.cat((self.flat, self.retired)))
        return flat, torch.cat((self.base, self.retired_base))[order]


@dataclass(frozen=True)
class Snapshot:
    """The ledger at one time: references, and a copy of the values where entries with trained values may go."""

    pages: list[Page]
    free: Tensor
    values: Tensor | None = None


class Places:
    """Where the entries stand (`selectune.types.Places`), computed when asked for."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._pages = ledger, list(ledger.pages)

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and columns there are; one more of each for slots not in use."""
        forms = [matrix(t.parameter) for t in self._ledger.tensors]
        return 1 + sum(rows for rows, _ in forms), 1 + sum(columns for _, columns in forms)

    @property
    def rows(self) -> Tensor:
        return self._filled(lambda page, width: page.flat // width, 0)

    @property
    def columns(self) -> Tensor:
        return self._filled(lambda page, width: page.flat % width, 1)

    @property
    def base(self) -> Tensor:
        values = self._ledger.values.detach()
        base = torch.zeros_like(values)
        for page in self._pages:
            base[page.slot] = page.base.to(values)
        return base

    def _filled(self, place: Callable[[Page, int], Tensor], side: int) -> Tensor:
        ledger, start = self._ledger, 0
        found = ledger.values.new_full(ledger.values.shape, self.shape[side] - 1, dtype=torch.int64)
        for tensor, page in zip(ledger.tensors, self._pages, strict=True):
            form = matrix(tensor.parameter)
            found[page.slot] = start + place(page, form[1]).to(found)
            start += form[side]
        return found


def matrix(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix: its first dimension by the others; a vector is one row."""
    rows = weight.shape[0] if weight.ndim > 1 else 1
    return rows, weight.numel() // max(1, rows)


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
        self.changes = 0  # of the support, ever

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
                self.changes += 1
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

    def drop(self, index: int, mask: Tensor) -> None:
        """Takes entries (n,) bool out of a tensor's support; their weights are the base again after `settle`."""
        self._retire(index, mask)

    @torch.no_grad()
    def settle(self) -> None:
        """Dropped weights are the base again, bit for bit, and forgotten."""
        for index, page in enumerate(self.pages):
            if page.retired.numel():
                ops.scatter_entries(self.tensors[index].parameter, page.retired, page.retired_base)
                self._keep(index, torch.ones_like(page.flat, dtype=torch.bool), page.retired[:0], page.retired_base[:0])

    def watch(self, index: int, flat: Tensor | None) -> None:
        """From the next forward on, gradients of these entries (n,) ascending are formed too; None: of none."""
        self.pages[index] = self.pages[index].watch(flat)

    def _insert(self, index: int, flat: Tensor, slots: Tensor) -> None:
        page, weight = self.pages[index], self.tensors[index].parameter
        flat, order = torch.sort(flat.to(weight.device))
        slots = slots[order.to(slots.device)]
        base = ops.gather_entries(weight, flat)
        with torch.no_grad():
            self.values[slots] = base.to(self.values)
        retired, retired_base = page.retired, page.retired_base
        if retired.numel():  # trained before: its base is the one recorded then
            back = torch.isin(retired, flat)
            base[torch.searchsorted(flat, retired[back])] = retired_base[back]
            retired, retired_base = retired[~back], retired_base[~back]
        self.changes += 1
        merged, order = torch.sort(torch.cat((page.flat, flat)))
        self.pages[index] = Page(
            merged,
            torch.cat((page.slot, slots))[order.to(slots.device)],
            torch.cat((page.base, base))[order],
            retired,
            retired_base,
            watched=page.watched,
        )

    def _retire(self, index: int, drop: Tensor) -> None:
        page = self.pages[index]
        if not bool(drop.any()):
            return
        retired, order = torch.sort(torch.cat((page.retired, page.flat[drop])))
        self._keep(index, ~drop, retired, torch.cat((page.retired_base, page.base[drop]))[order])

    def _keep(self, index: int, keep: Tensor, retired: Tensor, retired_base: Tensor) -> None:
        page = self.pages[index]
        here = keep.to(page.slot.device)
        self.free = torch.sort(torch.cat((page.slot[~here], self.free))).values
        self.pages[index] = Page(
            page.flat[keep], page.slot[here], page.base[keep], retired, retired_base, watched=page.watched
        )
        self.changes += 1

    # -- undoing a selection whose step was skipped

    def snapshot(self, *, values: bool = False) -> Snapshot:
        """The ledger as it is. `values`: entries with trained values may be dropped before a `restore`."""
        return Snapshot(list(self.pages), self.free, self.values.detach().clone() if values else None)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Puts pages back; slots they use again take their weight's present value, or the one in the snapshot."""
        self.pages, self.free = list(snapshot.pages), snapshot.free
        self.changes += 1
        if snapshot.values is not None:
            self.values.copy_(snapshot.values)  # the weights hold them still
            return
        self.values[self.free] = 0
        self.read_weights(only_changed=True)

    def joined(self, snapshot: Snapshot) -> list[Page]:
        """Pages for a graph that form the gradients of both supports; slots are those of `gather`."""
        return [
            now
            if now.flat is then.flat
            else Page(torch.unique(torch.cat((now.flat, then.flat))), now.slot, now.base, now.retired, now.retired_base,
                      watched=now.watched)
            for now, then in zip(self.pages, snapshot.pages, strict=True)
        ]  # fmt: skip

    # -- values <-> weights

    @torch.no_grad()
    def write_weights(self) -> None:
        """Casts every slot's value into its weight, in place: O(B)."""
        values = self.values.detach()
        near: list[tuple[Tensor, Tensor, Tensor]] = []
        for tensor, page in zip(self.tensors, self.pages, strict=True):
            weight, slot = tensor.parameter.detach(), page.slot
            if values.device == weight.device:
                near += [(weight, page.flat, slot)] if page.flat.numel() else []
            elif page.flat.numel():
                here = values[slot].to(weight.device)
                ops.scatter_values(weight, page.flat, here, torch.arange(len(slot), device=weight.device))
        if near:
            weights, flats, slots = zip(*near, strict=True)
            ops.scatter_many(weights, flats, values, slots)

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
        for page, mine, piece in zip(pages, self.pages, pieces, strict=True):
            if piece is None or not piece.numel():
                continue
            if page.flat is mine.flat:
                gradient[mine.slot] = piece.to(gradient)
            elif mine.flat.numel():  # the support changed since the graph was built
                at = torch.searchsorted(page.flat, mine.flat).clamp_(max=page.flat.numel() - 1)
                here = (page.flat[at] == mine.flat).to(mine.slot.device)
                gradient[mine.slot[here]] = piece.to(gradient)[at.to(mine.slot.device)[here]]
        return gradient
