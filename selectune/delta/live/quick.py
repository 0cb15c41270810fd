"""Prepared switches: a shelf's delta on its model, made ready once, so that a switch is few operations a tensor.

A plan keeps flat integer views of the model's tensors, indices on the tensors' devices, and new and base values in one
tensor each. It is valid for the model as it was seen (`look`). As soon as a tensor, a shape, a tie or a name has
changed, the shelf ignores the plan, and the careful switch does the work and explains any fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from selectune import bits
from selectune.bits import same_bits
from selectune.delta.file.content import Content
from selectune.delta.file.fingerprint import Inventory, own_tensors
from selectune.delta.live.base_check import drawn, fresh_digests
from selectune.delta.live.door import address
from selectune.delta.live.layers import Layer
from selectune.delta.live.writing import Write

WHOLE = 0.1
"""The largest share of a model's bytes that a delta with a plan may write in whole tensors."""

_TENSOR = 44  # low bits of a key: the place in a tensor; the bits above: the tensor's number


def look(model: nn.Module) -> list[Any]:
    """All properties of a model that a plan relies on, but values: modules, names, each tensor's memory and shape.

    It reads no weight. Two looks are equal as long as neither the structure nor the memory of any parameter or
    persistent buffer changed.
    """
    seen: list[Any] = []
    _look(model, seen)
    return seen


def _look(module: nn.Module, seen: list[Any]) -> None:
    seen.append(id(module))
    for name, kind, tensor in own_tensors(module):
        seen.append((name, kind, id(tensor), address(tensor), tensor.dtype, tensor.shape, tensor.stride()))
    for name, child in module._modules.items():
        if child is not None:
            seen.append(name)
            _look(child, seen)


@dataclass(frozen=True, eq=False)
class Group:
    """The scattered places of a delta in contiguous tensors of one device and one item size."""

    puts: tuple[Write, ...]  # on flat integer views of the tensors
    new: Tensor  # (n,) integers: the new values of all tensors, one tensor after the other
    old: Tensor  # (n,): the base's
    keys: Tensor  # (n,) int64, rising: the tensor's number and the place in it

    def read(self) -> Tensor:
        """The model's present values there `(n,)`."""
        return torch.cat([p.tensor.index_select(0, p.indices) for p in self.puts if p.indices is not None])


@dataclass(frozen=True, eq=False)
class SwitchPlan:
    """One delta on one model, as it was seen."""

    seen: list[Any]
    found: Inventory
    layer: Layer
    groups: dict[tuple[torch.device, int], Group]
    rest: tuple[Write, ...]  # whole tensors, and places in tensors that are not contiguous
    fresh: dict[str, str]  # digests of tensors that no checkpoint holds and that the delta does not write whole
    adapter: dict[str, Any] | None
    agreeing: WeakSet[SwitchPlan] = field(default_factory=WeakSet)  # plans with the same base in all common places

    @cached_property
    def on(self) -> list[Write]:
        """The writes that put the delta on the model."""
        return [put for group in self.groups.values() for put in group.puts] + list(self.rest)

    @cached_property
    def off(self) -> list[Write]:
        """The writes that take it off again."""
        return [write.reversed() for write in self.on]

    def in_place(self) -> bool:
        """Whether the model holds the delta's values, bit for bit."""
        return all(torch.equal(group.read(), group.new) for group in self.groups.values()) and all(
            same_bits(write.now, write.new) for write in self.rest
        )

    def fits(self, under: SwitchPlan | None) -> bool:
        """Whether the model without the delta `under`, whose values are in place, is the base wherever this one writes.

        False means "perhaps not": the careful switch decides where two deltas write one tensor in different ways.
        """
        if under is not None and under not in self.agreeing:
            if not self._agrees(under):
                return False
            self.agreeing.add(under)
        layers = [] if under is None else [under.layer]
        if any(drawn(self.fresh, self.adapter, self.found, layers)):
            return False
        for key, group in self.groups.items():
            now = group.read()
            if not torch.equal(now, group.old):
                # a place that differs from the base must be one of the other delta's places, where the base is the same
                other = None if under is None else under.groups.get(key)
                if other is None or not bool(_among(group.keys[(now != group.old)], other.keys)[1].all()):
                    return False
        covered = {} if under is None else under.layer.olds
        return all(_is_base(write, covered.get(write.name)) for write in self.rest)

    def _agrees(self, other: SwitchPlan) -> bool:
        """Whether two deltas have the same base in every common place, and write no tensor in different ways."""
        ways = {put.name: key for key, group in other.groups.items() for put in group.puts}
        ways |= {write.name: "beside" if beside(write) else write.indices is None for write in other.rest}
        for key, group in self.groups.items():
            if any(ways.get(put.name, key) != key for put in group.puts):
                return False
            if key in other.groups:
                at, hit = _among(group.keys, other.groups[key].keys)
                if not torch.equal(other.groups[key].old[at[hit]], group.old[hit]):
                    return False
        for write in self.rest:
            if write.name in ways and not (beside(write) and ways[write.name] == "beside"):
                whole = write.indices is None and ways[write.name] is True
                if not whole or not same_bits(other.layer.olds[write.name][1], write.old):
                    return False
        return True


def beside(write: Write) -> bool:
    """Whether it writes beside a quantised weight, where the base of every delta is 0."""
    return not isinstance(write.tensor, Tensor)


def _is_base(write: Write, covered: tuple[Tensor | None, Tensor] | None) -> bool:
    """Whether the model without the values that another delta covers is the base where this one writes."""
    if covered is None:
        return same_bits(write.now, write.old)
    if not beside(write) or covered[0] is None or write.indices is None:
        return True
    return not bool(bits.int_view(write.now)[torch.isin(write.indices, covered[0], invert=True)].any())


def _among(keys: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each key among `others`, which rise, and whether the key is there."""
    at = torch.searchsorted(others, keys).clamp_(max=len(others) - 1)
    return at, others[at] == keys


def worth_it(made: Sequence[Write], found: Inventory) -> bool:
    """Whether few bytes are in whole tensors: for those a plan keeps a copy of the base and saves little time."""
    whole = sum(write.tensor.nbytes for write in made if write.indices is None)
    return whole <= WHOLE * sum(entry.tensor.nbytes for entry in found.entries)


@torch.inference_mode(False)  # views made in inference mode could not be written to outside it
def plan_for(delta: Content, seen: list[Any], found: Inventory, made: Sequence[Write], layer: Layer) -> SwitchPlan:
    """The plan of a delta whose writes `made` were checked against the base. It takes O(B) memory."""
    number = {entry.name: place for place, entry in enumerate(found.entries)}
    sorted_out: dict[tuple[torch.device, int], list[Write]] = {}
    rest = []
    for write in sorted(made, key=lambda write: number[write.name]):
        if write.indices is None or not write.tensor.is_contiguous():
            rest.append(write)
        elif len(write.indices):
            sorted_out.setdefault((write.tensor.device, write.tensor.element_size()), []).append(write)
    groups = {key: _group(writes, key[0], number) for key, writes in sorted_out.items()}
    fresh = fresh_digests(delta, found)
    return SwitchPlan(seen, found, layer, groups, tuple(rest), fresh, delta.info.get("module"))


def _group(writes: Sequence[Write], device: torch.device, number: dict[str, int]) -> Group:
    lengths = [write.new.numel() for write in writes]
    wheres = torch.cat([write.indices for write in writes if write.indices is not None])
    numbers = torch.tensor([number[write.name] for write in writes]).repeat_interleave(torch.tensor(lengths))
    keys = ((numbers << _TENSOR) + wheres).to(device)
    new, old = (
        torch.cat([bits.int_view(values) for values in column]).to(device)
        for column in ([write.new for write in writes], [write.old for write in writes])
    )
    parts = zip(writes, wheres.to(device).split(lengths), new.split(lengths), old.split(lengths), strict=True)
    puts = [Write(write.name, bits.int_view(write.tensor).view(-1), where, n, o) for write, where, n, o in parts]
    return Group(tuple(puts), new, old, keys)
