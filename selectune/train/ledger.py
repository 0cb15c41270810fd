"""The ledger: which entry of which tensor is trained in which slot, and its base value.

One trainable vector `offsets` (B,) has a slot for every selected scalar, in order of selection: the difference from
its weight at selection, `start`. The offset is 0 at selection and in free slots; the weight is cast(start + offset).
A page per tensor keeps the sorted flat indices of its entries, their slots and their base values. Entries that were
trained and then dropped (repeat schedules) stay listed as retired, so that the base can be put back and the delta is
complete. Index tensors are replaced, never changed in place, so a snapshot is a list of references.
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
        """Rows (n,) and columns (n,), int32, of the entries in a tensor of this width; computed once."""
        if self._coordinates is None:
            self._coordinates = ((self.flat // width).int(), (self.flat % width).int())
        return self._coordinates


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
    def empty(weight: Tensor, home: torch.device) -> Page:
        none = torch.empty(0, dtype=torch.int64, device=weight.device)
        return Page(none, none.to(home), weight.new_empty(0), none, weight.new_empty(0))

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


@dataclass(frozen=True)
class Snapshot:
    """The ledger at one time: references, and copies of offsets and starts if trained entries may leave."""

    pages: list[Page]
    free: Tensor
    offsets: Tensor | None = None
    start: Tensor | None = None


class LedgerPositions:
    """The positions of the entries (`optim.contract.Positions`), computed on request."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._pages = ledger, list(ledger.pages)

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns; one more of each for free slots."""
        forms = [matrix(t.parameter) for t in self._ledger.tensors]
        return 1 + sum(rows for rows, _ in forms), 1 + sum(columns for _, columns in forms)

    @property
    def rows(self) -> Tensor:
        return self._filled(lambda page, width: page.flat // width, 0)

    @property
    def columns(self) -> Tensor:
        return self._filled(lambda page, width: page.flat % width, 1)

    def _filled(self, place: Callable[[Page, int], Tensor], side: int) -> Tensor:
        ledger, start = self._ledger, 0
        found = ledger.free.new_full(ledger.offsets.shape, self.shape[side] - 1)
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
    """All pages, and the one trainable vector that they share."""

    def __init__(self, tensors: Sequence[ScopedTensor], capacity: int) -> None:
        self.tensors = tensors
        weights = [t.parameter.detach() for t in tensors]
        wide = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
        home = weights[0].device if weights else torch.device("cpu")
        self.offsets = nn.Parameter(torch.zeros(capacity, dtype=wide, device=home))
        self.start = torch.zeros(capacity, dtype=wide, device=home)  # the weight of each slot at selection
        self.dtypes = [w.dtype for w in weights]
        self.pages = [Page.empty(w, home) for w in weights]
        self.free = torch.arange(capacity, device=home)  # unused slots, lowest first
        self.changes = 0  # how often the support has changed

    @property
    def selected(self) -> int:
        return self.offsets.numel() - self.free.numel()

    @property
    def touched(self) -> int:
        return self.selected + sum(p.retired.numel() for p in self.pages)

    def follow(self) -> None:
        """Moves the pages to the weights' devices; IntegrityError if a weight changed its dtype."""
        home = self.offsets.device
        self.start = self.start.to(home)
        for index, (tensor, page) in enumerate(zip(self.tensors, self.pages, strict=True)):
            weight = tensor.parameter.detach()
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

        A slot starts from the present weight, with an offset of 0.
        """
        slots, self.free = self.free[: flat.numel()], self.free[flat.numel() :]
        order = torch.argsort(tensors, stable=True)
        counts = torch.bincount(tensors, minlength=len(self.tensors)).tolist()
        parts = flat[order].split(counts), slots[order.to(slots.device)].split(counts)
        for index, (mine, taken) in enumerate(zip(*parts, strict=True)):
            if mine.numel():
                self._insert(index, mine, taken)
        return slots

    def replace(self, tensors: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Makes these entries the support; those that are in it already keep their slots.

        Returns which of the given entries are new, bool (k,), and their slots.
        """
        new = torch.ones(flat.numel(), dtype=torch.bool)
        for index, page in enumerate(self.pages):
            mine = tensors == index
            chosen = flat[mine].to(page.flat.device)
            new[mine] = torch.isin(chosen, page.flat, invert=True).cpu()
            self.drop(index, torch.isin(page.flat, chosen, invert=True))
        return new, self.add(tensors[new], flat[new])

    def drop(self, index: int, mask: Tensor) -> None:
        """Retires entries (n,) bool of a tensor; `settle` makes their weights the base again."""
        page = self.pages[index]
        if bool(mask.any()):
            retired, order = torch.sort(torch.cat((page.retired, page.flat[mask])))
            self._keep(index, ~mask, retired, torch.cat((page.retired_base, page.base[mask]))[order])

    @torch.no_grad()
    def settle(self) -> None:
        """Makes the weights of dropped entries the base again, bit for bit, and forgets these entries."""
        for index, page in enumerate(self.pages):
            if page.retired.numel():
                ops.scatter_entries(self.tensors[index].parameter.detach(), page.retired, page.retired_base)
                self._keep(index, torch.ones_like(page.flat, dtype=torch.bool), page.retired[:0], page.retired_base[:0])

    def watch(self, index: int, flat: Tensor | None) -> None:
        """From the next forward on, forms the gradients of these entries (w,) ascending too; None ends that."""
        self.pages[index] = self.pages[index].watch(flat)

    def _insert(self, index: int, flat: Tensor, slots: Tensor) -> None:
        page, weight = self.pages[index], self.tensors[index].parameter.detach()
        flat, order = torch.sort(flat.to(weight.device))
        slots = slots[order.to(slots.device)]
        base = ops.gather_entries(weight, flat)
        with torch.no_grad():
            self.start[slots] = base.to(self.start)
            self.offsets[slots] = 0
        retired, retired_base = page.retired, page.retired_base
        if retired.numel():  # an entry that was trained before keeps the base value recorded then
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
            page.watched,
        )

    def _keep(self, index: int, keep: Tensor, retired: Tensor, retired_base: Tensor) -> None:
        page = self.pages[index]
        kept = keep.to(page.slot.device)
        self.free = torch.sort(torch.cat((page.slot[~kept], self.free))).values
        self.pages[index] = Page(
            page.flat[keep], page.slot[kept], page.base[keep], retired, retired_base, watched=page.watched
        )
        self.changes += 1

    # -- undoing a selection whose step was skipped

    def snapshot(self, *, trained: bool = False) -> Snapshot:
        """The ledger as it is. `trained`: entries with an offset may be dropped before a `restore`."""
        kept = (self.offsets.detach().clone(), self.start.clone()) if trained else (None, None)
        return Snapshot(list(self.pages), self.free, *kept)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Puts pages, offsets and starts back, and the weights of entries that were selected since."""
        for tensor, now, then in zip(self.tensors, self.pages, snapshot.pages, strict=True):
            if now.flat is not then.flat:
                new = torch.isin(now.flat, then.flat, invert=True)
                flat, start = now.flat[new], self.start[now.slot[new.to(now.slot.device)]].to(tensor.parameter)
                if not _same(start, ops.gather_entries(tensor.parameter.detach(), flat)):  # autograd sees every write
                    ops.scatter_entries(tensor.parameter.detach(), flat, start)
        self.pages, self.free = list(snapshot.pages), snapshot.free
        self.changes += 1
        if snapshot.offsets is not None and snapshot.start is not None:
            self.offsets.copy_(snapshot.offsets)
            self.start.copy_(snapshot.start)
        else:
            self.offsets[self.free] = 0

    def joined(self, snapshot: Snapshot) -> list[Page]:
        """Pages for a graph that forms the gradients of both supports, to be read by `gather`."""
        return [
            now
            if now.flat is then.flat
            else Page(torch.unique(torch.cat((now.flat, then.flat))), now.slot, now.base, now.retired, now.retired_base,
                      now.watched)
            for now, then in zip(self.pages, snapshot.pages, strict=True)
        ]  # fmt: skip

    # -- offsets <-> weights

    @torch.no_grad()
    def values(self) -> Tensor:
        """start + offset of every slot (B,); an offset of 0 gives the start's own bits."""
        offsets = self.offsets.detach()
        return torch.where(offsets == 0, self.start, self.start + offsets)

    @torch.no_grad()
    def write_weights(self) -> None:
        """Casts every slot's start + offset into its weight, in place: O(B)."""
        values = self.values()
        near: list[tuple[Tensor, Tensor, Tensor]] = []
        for tensor, page in zip(self.tensors, self.pages, strict=True):
            weight, slot = tensor.parameter.detach(), page.slot
            if values.device == weight.device:
                near += [(weight, page.flat, slot)] if page.flat.numel() else []
            elif page.flat.numel():
                mine = values[slot].to(weight.device)
                ops.scatter_values(weight, page.flat, mine, torch.arange(len(slot), device=weight.device))
        if near:
            weights, flats, slots = zip(*near, strict=True)
            ops.scatter_many(weights, flats, values, slots)

    @torch.no_grad()
    def read_weights(self) -> None:
        """Sets the offsets to what gives the present weights; a slot that gives its weight's bits keeps its offset.

        That is weight - start, or its neighbour if rounding requires it. If none of them gives the weight's bits (it
        was not trained from this start), the weight becomes the start.
        """
        values = self.values()
        for tensor, page in zip(self.tensors, self.pages, strict=True):
            weight = ops.gather_entries(tensor.parameter.detach(), page.flat)
            wanted = weight.to(values.device, values.dtype)
            differs = (ops.bits(values[page.slot].to(weight.dtype)) != ops.bits(weight).to(values.device)).nonzero()
            slot, wanted, weight = (x[differs[:, 0].to(x.device)] for x in (page.slot, wanted, weight))
            start = self.start[slot]
            offset, done = wanted - start, torch.zeros_like(slot, dtype=torch.bool)
            for towards in (0.0, float("inf"), float("-inf")):
                near = offset if towards == 0 else torch.nextafter(offset, torch.full_like(offset, towards))
                gives = torch.where(near == 0, start, start + near).to(weight.dtype)
                fits = (ops.bits(gives) == ops.bits(weight).to(gives.device)) & ~done
                self.offsets[slot[fits]] = near[fits]
                done |= fits
            self.start[slot[~done]] = wanted[~done]
            self.offsets[slot[~done]] = 0

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether every slot gives the bits of its weight, so that no optimizer has moved it since."""
        return not self.strays()

    @torch.no_grad()
    def strays(self) -> list[str]:
        """Names of tensors with selected weights that differ from start + offset."""
        values = self.values()
        return [
            tensor.name
            for tensor, page in zip(self.tensors, self.pages, strict=True)
            if not _same(values[page.slot], ops.gather_entries(tensor.parameter.detach(), page.flat))
        ]

    @torch.no_grad()
    def changed(self) -> int:
        """How many touched entries differ from the base in their bits."""
        count = 0
        for tensor, page in zip(self.tensors, self.pages, strict=True):
            flat, base = page.touched()
            now = ops.gather_entries(tensor.parameter.detach(), flat)
            count += int((ops.bits(now) != ops.bits(base)).sum())
        return count

    @torch.no_grad()
    def write_base(self) -> None:
        """Puts the base value back at every touched entry, bit for bit."""
        for tensor, page in zip(self.tensors, self.pages, strict=True):
            ops.scatter_entries(tensor.parameter.detach(), *page.touched())

    def gather(self, pages: Sequence[Page], pieces: Sequence[Tensor | None]) -> Tensor:
        """One gradient (B,) from the gradients (n,) of the tensors' pieces; slots without one get 0."""
        gradient = torch.zeros_like(self.offsets)
        for page, mine, piece in zip(pages, self.pages, pieces, strict=True):
            if piece is None or not piece.numel():
                continue
            if page.flat is mine.flat:
                gradient[mine.slot] = piece.to(gradient)
            elif mine.flat.numel():  # the support changed since the graph was made
                at = torch.searchsorted(page.flat, mine.flat).clamp_(max=page.flat.numel() - 1)
                known = (page.flat[at] == mine.flat).to(mine.slot.device)
                gradient[mine.slot[known]] = piece.to(gradient)[at.to(mine.slot.device)[known]]
        return gradient


def _same(value: Tensor, weight: Tensor) -> bool:
    return bool((ops.bits(value.to(weight)) == ops.bits(weight)).all())
