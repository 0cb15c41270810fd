"""Where offsets live. Entries of weights in scope are read, compared and written through a store only.

In place: a selected entry of the weight is cast(start + offset) itself, and its base value is in the ledger. Of a
sharded weight each rank writes what lies in its part.
Beside: a quantised weight never moves. Its entries are the offsets themselves, so that starts and base values are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selectune import ops
from selectune.beside import side_of
from selectune.scope import ScopedTensor
from selectune.train.support.pages import Page
from selectune.train.support.shards import ShardedTensor


class InPlace:
    """Offsets in the weights themselves."""

    def __init__(self, tensors: Sequence[ScopedTensor]) -> None:
        self.tensors = tensors

    def read(self, index: int, flat: Tensor) -> Tensor:
        """The entries (n,) of a tensor that the model computes with, in its dtype."""
        return ops.gather_entries(self.tensors[index].weight, flat)

    def numbers(self, index: int, flat: Tensor) -> Tensor:
        """The entries (n,) of a tensor's weight, for a score that reads them."""
        return self.read(index, flat)

    def same(self, index: int, flat: Tensor, values: Tensor) -> Tensor:
        """Which of these values (n,), cast to the tensor's dtype, have the bits of its entries: bool (n,)."""
        weight = self.read(index, flat)
        return ops.bits(values.to(weight)) == ops.bits(weight)

    def write(self, index: int, flat: Tensor, values: Tensor) -> None:
        """Makes the entries of a tensor these values (n,)."""
        weight = self.tensors[index].weight
        ops.scatter_entries(weight, flat, values.to(weight))

    def write_slots(self, pages: Sequence[Page], values: Tensor) -> None:
        """Casts the value (B,) of every slot into its entry."""
        self._write_slots(list(zip(self.tensors, pages, strict=True)), values)

    def _write_slots(self, parts: Sequence[tuple[ScopedTensor, Page]], values: Tensor) -> None:
        near: list[tuple[Tensor, Tensor, Tensor]] = []
        for tensor, page in parts:
            weight, slot = tensor.weight, page.slot
            if values.device == weight.device:
                near += [(weight, page.flat, slot)] if page.flat.numel() else []
            elif page.flat.numel():
                mine = values[slot].to(weight.device)
                ops.scatter_values(weight, page.flat, mine, torch.arange(len(slot), device=weight.device))
        if near:
            weights, flats, slots = zip(*near, strict=True)
            ops.scatter_many(weights, flats, values, slots)

    def base(self, index: int, page: Page) -> Tensor:
        """A copy of a tensor's base."""
        copy = self.tensors[index].weight.clone()
        ops.scatter_entries(copy, *page.touched())
        return copy


class InShards(InPlace):
    """Offsets in weights of which some are sharded. What is read, all ranks read together."""

    def read(self, index: int, flat: Tensor) -> Tensor:
        tensor = self.tensors[index]
        return tensor.part.read(flat) if isinstance(tensor, ShardedTensor) else super().read(index, flat)

    def write(self, index: int, flat: Tensor, values: Tensor) -> None:
        tensor = self.tensors[index]
        if isinstance(tensor, ShardedTensor):
            tensor.part.write(flat, values)
        else:
            super().write(index, flat, values)

    def write_slots(self, pages: Sequence[Page], values: Tensor) -> None:
        for tensor, page in zip(self.tensors, pages, strict=True):
            if page.flat.numel():
                self.write(tensor.index, page.flat, values[page.slot].to(page.flat.device))


class Beside(InPlace):
    """Offsets of quantised weights beside them, and those of all other weights in place."""

    def __init__(self, tensors: Sequence[ScopedTensor]) -> None:
        super().__init__(tensors)
        self.sides = {t.index: side_of(t.quantised) for t in tensors if t.quantised is not None}

    def read(self, index: int, flat: Tensor) -> Tensor:
        side = self.sides.get(index)
        return super().read(index, flat) if side is None else side.gather(flat)

    def numbers(self, index: int, flat: Tensor) -> Tensor:
        return self.tensors[index].weight.view(-1)[flat] if index in self.sides else self.read(index, flat)

    def write(self, index: int, flat: Tensor, values: Tensor) -> None:
        side = self.sides.get(index)
        if side is None:
            super().write(index, flat, values)
        else:
            side.scatter(flat, values.to(side.dtype))

    def write_slots(self, pages: Sequence[Page], values: Tensor) -> None:
        parts = list(zip(self.tensors, pages, strict=True))
        self._write_slots([(tensor, page) for tensor, page in parts if tensor.index not in self.sides], values)
        for index, side in self.sides.items():
            page = pages[index]
            mine = values[page.slot].to(page.flat.device, side.dtype)
            if page.retired.numel():
                side.scatter(page.flat, mine)
            else:
                side.hold(page.flat, mine)


def store_of(tensors: Sequence[ScopedTensor]) -> InPlace:
    """Where the offsets of these tensors live."""
    if any(tensor.quantised is not None for tensor in tensors):
        return Beside(tensors)
    return InShards(tensors) if any(isinstance(tensor, ShardedTensor) for tensor in tensors) else InPlace(tensors)
