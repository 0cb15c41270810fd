"""A shelf's delta on its model, made ready once, so that a switch is few operations a tensor.

What is remembered: flat integer views of the tensors, indices where the tensors are, new and base values one behind
the other. It holds for the model as it was seen (`look`): as soon as a tensor, a shape, a tie or a name is another one
there is no plan, and `delta/apply.py`, which explains what is wrong, does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from selectune import bits
from selectune.bits import same_bits
from selectune.delta.delta import Delta
from selectune.delta.file.fingerprint import Inventory
from selectune.delta.live import apply as live
from selectune.delta.live.door import address
from selectune.delta.live.writing import Write, Writing

WHOLE = 0.1
"""The share of a model's bytes that a delta may write whole and still be kept ready."""

_TENSOR = 44  # bits of a key that say where in a tensor; those above say in which tensor


def look(model: nn.Module) -> list[Any]:
    """Everything that a plan rests on but values: modules, names, and where and what each tensor is. Reads no weight.

    Two looks are equal as long as neither the structure nor the memory of any parameter or persistent buffer changed.
    """
    seen: list[Any] = []
    _look(model, seen)
    return seen


def _look(module: nn.Module, seen: list[Any]) -> None:
    seen.append(id(module))
    for name, tensor in module._parameters.items():
        if tensor is not None:
            seen.append((name, id(tensor), address(tensor), tensor.dtype, tensor.shape, tensor.stride()))
    left_out = module._non_persistent_buffers_set
    for name, tensor in module._buffers.items():
        if tensor is not None and name not in left_out:
            seen.append((name, id(tensor), address(tensor), tensor.dtype, tensor.shape, tensor.stride(), "buffer"))
    for name, child in module._modules.items():
        if child is not None:
            seen.append(name)
            _look(child, seen)


@dataclass(frozen=True, eq=False)
class PatchPut:
    """A `Write` with its work done beforehand."""

    name: str
    flat: Tensor
    where: Tensor
    new: Tensor
    old: Tensor

    def do(self, values: Tensor) -> None:
        """Put `values` there."""
        bits.put(self.flat, self.where, values)

    def holds(self, values: Tensor) -> bool:
        """Whether `values` are there."""
        return torch.equal(self.flat.index_select(0, self.where), values)


@dataclass(frozen=True, eq=False)
class Group:
    """The scattered places of a delta in contiguous tensors of one device and one width."""

    puts: tuple[PatchPut, ...]
    new: Tensor  # (n,) integers, of all tensors one behind the other
    old: Tensor  # (n,): the base's
    keys: Tensor  # (n,) int64, rising: the tensor's number and the place in it

    def read(self) -> Tensor:
        """What the model holds there `(n,)`."""
        return torch.cat([put.flat.index_select(0, put.where) for put in self.puts])


@dataclass(frozen=True, eq=False)
class SwitchPlan:
    """One delta on one model, as it was seen."""

    seen: list[Any]
    found: Inventory
    layer: live.Layer
    groups: dict[tuple[torch.device, int], Group]
    rest: tuple[Write, ...]  # whole tensors, and places in tensors that are not contiguous
    fresh: dict[str, str]  # digests of tensors that no checkpoint holds, and that the delta does not write whole
    module: dict[str, Any] | None
    on: tuple[Writing, ...]
    off: tuple[Writing, ...]
    agreeing: WeakSet[SwitchPlan] = field(default_factory=WeakSet)  # plans that have the same base in all common places

    def in_place(self) -> bool:
        """Whether the model holds the delta's values, bit for bit."""
        return all(torch.equal(group.read(), group.new) for group in self.groups.values()) and all(
            same_bits(_now(write), write.new) for write in self.rest
        )

    def fits(self, under: SwitchPlan | None) -> bool:
        """Whether the model, seen through a delta whose values are in place, is the base wherever this one writes.

        False says "perhaps not": where two deltas write one tensor in different ways the question is left to others.
        """
        if under is not None and under not in self.agreeing:
            if not self._agrees(under):
                return False
            self.agreeing.add(under)
        layers = [] if under is None else [under.layer]
        if any(live.drawn(self.fresh, self.module, self.found, layers)):
            return False
        for key, group in self.groups.items():
            now = group.read()
            if not torch.equal(now, group.old):
                # the places that are not the base's have to be the other delta's, whose base is the same
                other = None if under is None else under.groups.get(key)
                if other is None or not bool(_among(group.keys[(now != group.old)], other.keys)[1].all()):
                    return False
        covered = {} if under is None else under.layer.olds
        return all(write.name in covered or same_bits(_now(write), write.old) for write in self.rest)

    def _agrees(self, other: SwitchPlan) -> bool:
        """Whether two deltas that share a place have one base there, and write no tensor in different ways."""
        ways = {put.name: key for key, group in other.groups.items() for put in group.puts}
        ways |= {write.name: write.indices is None for write in other.rest}
        for key, group in self.groups.items():
            if any(ways.get(put.name, key) != key for put in group.puts):
                return False
            if key in other.groups:
                at, hit = _among(group.keys, other.groups[key].keys)
                if not torch.equal(other.groups[key].old[at[hit]], group.old[hit]):
                    return False
        for write in self.rest:
            if write.name in ways:
                whole = write.indices is None and ways[write.name] is True
                if not whole or not same_bits(other.layer.olds[write.name][1], write.old):
                    return False
        return True


def _among(keys: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Where each key would stand among others, which rise, and whether it does stand there."""
    at = torch.searchsorted(others, keys).clamp_(max=len(others) - 1)
    return at, others[at] == keys


def _now(write: Write) -> Tensor:
    return write.tensor if write.indices is None else bits.gather(write.tensor, write.indices)


def worth_it(made: Sequence[Write], found: Inventory) -> bool:
    """Whether the tensors that are written whole are few: a plan keeps a copy of the base's, and saves little there."""
    whole = sum(write.tensor.nbytes for write in made if write.indices is None)
    return whole <= WHOLE * sum(entry.tensor.nbytes for entry in found.entries)


@torch.inference_mode(False)  # views made in inference mode could not be written to outside it
def plan_for(delta: Delta, seen: list[Any], found: Inventory, made: Sequence[Write], layer: live.Layer) -> SwitchPlan:
    """The plan of a delta whose writes `made` were checked against the base: O(B) memory, tensors once more."""
    info = delta.info
    number = {entry.name: place for place, entry in enumerate(found.entries)}
    sorted_out: dict[tuple[torch.device, int], list[Write]] = {}
    rest = []
    for write in sorted(made, key=lambda write: number[write.name]):
        if write.indices is None or not write.tensor.is_contiguous():
            rest.append(write)
        elif len(write.indices):
            sorted_out.setdefault((write.tensor.device, write.tensor.element_size()), []).append(write)
    groups = {key: _group(writes, key[0], number) for key, writes in sorted_out.items()}
    puts = [put for group in groups.values() for put in group.puts]
    replaced = live.anew(delta, found)
    return SwitchPlan(
        seen,
        found,
        layer,
        groups,
        tuple(rest),
        {r["name"]: r["digest"] for r in info["base"]["initialised"] if found.find[r["name"]].name not in replaced},
        info.get("module"),
        (*puts, *rest),
        (
            *(PatchPut(put.name, put.flat, put.where, put.old, put.new) for put in puts),
            *(Write(write.name, write.tensor, write.indices, write.old, write.new) for write in rest),
        ),
    )


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
    puts = [PatchPut(write.name, bits.int_view(write.tensor).view(-1), where, n, o) for write, where, n, o in parts]
    return Group(tuple(puts), new, old, keys)
