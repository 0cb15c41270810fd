"""The ledger: which entry of which tensor is trained in which slot, and its base value.

One trainable vector `offsets` (B,) has a slot for every selected scalar, in order of selection: the difference from
its weight at selection, `start`. The offset is 0 at selection and in free slots; the weight is cast(start + offset).
A page per tensor keeps the sorted flat indices of its entries, their slots and their base values. Entries that were
trained and then dropped (repeat schedules) stay listed as retired, so that the base can be put back and the delta is
complete. Index tensors are replaced, never changed in place, so a snapshot is a list of references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selectune.errors import IntegrityError
from selectune.scope import ScopedTensor
from selectune.train.support.pages import Page
from selectune.train.support.store import store_of


@dataclass(frozen=True)
class Snapshot:
    """The ledger at one time: references, and copies of offsets and starts if trained entries may leave."""

    pages: list[Page]
    free: Tensor
    offsets: Tensor | None = None
    start: Tensor | None = None


class Ledger:
    """All pages, and the one trainable vector that they share."""

    def __init__(self, tensors: Sequence[ScopedTensor], capacity: int) -> None:
        self.tensors, self.store = tensors, store_of(tensors)
        forms = [t.form for t in tensors]
        wide = torch.float64 if any(form.dtype == torch.float64 for form in forms) else torch.float32
        home = forms[0].device if forms else torch.device("cpu")
        self.offsets = nn.Parameter(torch.zeros(capacity, dtype=wide, device=home))
        self.start = torch.zeros(capacity, dtype=wide, device=home)  # the weight of each slot at selection
        self.dtypes = [form.dtype for form in forms]
        self.pages = [Page.empty(form.dtype, form.device, home) for form in forms]
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
            form = tensor.form
            if form.dtype != self.dtypes[index]:
                raise IntegrityError(
                    f'The dtype of "{tensor.name}" changed from {self.dtypes[index]} to {form.dtype} while a tuner '
                    "is attached, so its base could not be restored. Cast the model before attach."
                )
            if page.flat.device != form.device or page.slot.device != home:
                self.pages[index] = page.to(form.device, home)
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
                self.store.write(index, page.retired, page.retired_base)
                self._keep(index, torch.ones_like(page.flat, dtype=torch.bool), page.retired[:0], page.retired_base[:0])

    def watch(self, index: int, flat: Tensor | None) -> None:
        """From the next forward on, forms the gradients of these entries (w,) ascending too; None ends that."""
        self.pages[index] = self.pages[index].watch(flat)

    def _insert(self, index: int, flat: Tensor, slots: Tensor) -> None:
        page = self.pages[index]
        flat, order = torch.sort(flat.to(page.flat.device))
        slots = slots[order.to(slots.device)]
        base = self.store.read(index, flat)
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
        for index, (now, then) in enumerate(zip(self.pages, snapshot.pages, strict=True)):
            if now.flat is not then.flat:
                new = torch.isin(now.flat, then.flat, invert=True)
                flat, start = now.flat[new], self.start[now.slot[new.to(now.slot.device)]]
                if not bool(self.store.same(index, flat, start).all()):  # autograd sees every write
                    self.store.write(index, flat, start)
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
        """Casts every slot's start + offset into its weight: O(B)."""
        self.store.write_slots(self.pages, self.values())

    @torch.no_grad()
    def read_weights(self) -> None:
        """Sets the offsets to what gives the present weights; a slot that gives its weight's bits keeps its offset.

        That is weight - start, or its neighbour if rounding requires it. If none of them gives the weight's bits (it
        was not trained from this start), the weight becomes the start.
        """
        values, store = self.values(), self.store
        for index, page in enumerate(self.pages):
            differs = ~store.same(index, page.flat, values[page.slot])
            flat, slot = page.flat[differs], page.slot[differs.to(page.slot.device)]
            start, wanted = self.start[slot], store.read(index, flat).to(values)
            offset, done = wanted - start, torch.zeros_like(slot, dtype=torch.bool)
            for towards in (0.0, float("inf"), float("-inf")):
                near = offset if towards == 0 else torch.nextafter(offset, torch.full_like(offset, towards))
                fits = store.same(index, flat, torch.where(near == 0, start, start + near)).to(done.device) & ~done
                self.offsets[slot[fits]] = near[fits]
                done |= fits
            self.start[slot[~done]] = wanted[~done]
            self.offsets[slot[~done]] = 0

    @torch.no_grad()
    def strays(self) -> list[str]:
        """Names of tensors with selected weights that differ from start + offset: an optimizer has moved these."""
        values = self.values()
        return [
            tensor.name
            for tensor, page in zip(self.tensors, self.pages, strict=True)
            if not bool(self.store.same(tensor.index, page.flat, values[page.slot]).all())
        ]

    @torch.no_grad()
    def changed(self) -> int:
        """How many touched entries differ from the base in their bits."""
        return sum(int((~self.store.same(index, *page.touched())).sum()) for index, page in enumerate(self.pages))

    @torch.no_grad()
    def write_base(self) -> None:
        """Puts the base value back at every touched entry, bit for bit."""
        for index, page in enumerate(self.pages):
            self.store.write(index, *page.touched())

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
