"""The deltas that are applied to a model, as layers with the values that they cover."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from selectune import bits
from selectune.bits import same_bits
from selectune.delta.file.fingerprint import Entry, Inventory, inventory, unwrapped
from selectune.delta.live.door import Claim, Hold, alone, claim_of
from selectune.errors import DeltaStateError

Covered = dict[str, tuple[Tensor | None, Tensor]]
"""{name of a tensor: (the indices that a delta writes or None for all, the values that were there before)}."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One applied delta: its digest, a label for messages, and the values that it covers."""

    digest: str
    label: str
    olds: Covered
    changes: bool  # whether any bit differed
    claim: Claim  # of the model, as it was when the delta was applied
    name: str = ""  # of the delta on the shelf that applied it


_STACKS: WeakKeyDictionary[nn.Module, list[Layer]] = WeakKeyDictionary()
_STACKS_LOCK = RLock()


def stack_of(model: nn.Module) -> list[Layer]:
    """The deltas applied to a model, oldest first. This is the record itself, no copy."""
    with _STACKS_LOCK:
        return _STACKS.setdefault(unwrapped(model), [])


def exclusive(model: nn.Module, what: str, timeout: float | None = None) -> AbstractContextManager[Hold]:
    """A block in which no other thread reads through a shelf's door or writes weights of the model; may be nested.

    It also keeps threads away from parts of the model, from a whole that contains it, and from models that share a
    weight with it at the time of entering. Raises as `door.enter` does.
    """
    return alone(claim_of(unwrapped(model)), what, timeout)


def ready(model: nn.Module) -> Inventory:
    """The model's tensors; raises DeltaStateError while a tuner is attached."""
    found = inventory(model)
    if found.attached:
        raise DeltaStateError(
            "a tuner is attached to the model, which may move its weights at any step; call tuner.detach() before "
            "deltas are applied or reverted (or selectune.strip(model), if it is a copy of an attached model)"
        )
    return found


def sharing(model: nn.Module, claim: Claim) -> tuple[nn.Module, list[Layer]] | None:
    """Another model that shares weights with this one and has a delta applied, with its stack; or None."""
    model = unwrapped(model)
    with _STACKS_LOCK:
        others = [(other, stack) for other, stack in _STACKS.items() if stack and other is not model]
    for other, stack in others:
        # the layer's claim may be out of date, so the other model's present claim has to meet this one too
        if stack[-1:] and stack[-1].claim.meets(claim) and claim_of(other).meets(claim):
            return other, stack
    return None


def check_sharing(model: nn.Module, claim: Claim) -> None:
    """Raise DeltaStateError if a delta is applied to another model that shares weights with this one."""
    while (found := sharing(model, claim)) is not None:
        other, stack = found
        forget_undone(stack, inventory(other))
        if stack:
            raise DeltaStateError(
                f"{stack[-1].label} is applied to a model that shares weights with this one (a part of it, a whole "
                f"that it belongs to, or one with tied weights); revert it there first, or switch its shelf to None"
            )


def forget_undone(stack: list[Layer], found: Inventory) -> None:
    """Drop the topmost layers whose old values are in the model again, as after loading a state dict."""
    while stack and stack[-1].changes and _undone(stack[-1], found):
        stack.pop()


def _undone(layer: Layer, found: Inventory) -> bool:
    return all(name in found.find and _equals(found.find[name].tensor, *at) for name, at in layer.olds.items())


def _equals(tensor: Tensor, where: Tensor | None, old: Tensor) -> bool:
    if where is None:
        return same_bits(tensor, old)
    return bool(where[-1] < tensor.numel()) and same_bits(bits.gather(tensor, where), old)


def base_at(entry: Entry, where: Tensor | None, under: Sequence[Layer] = ()) -> Tensor:
    """The values at `where` (None: of the whole tensor) as they are without the layers `under` (oldest first)."""
    covered = [layer.olds[entry.name] for layer in reversed(under) if entry.name in layer.olds]
    if where is not None:
        return _uncovered(bits.gather(entry.tensor, where), where, covered)
    if not covered:
        return entry.tensor
    values = copied(entry.tensor)
    for at, olds in covered:
        if at is None:
            bits.overwrite(values, olds)
        else:
            bits.scatter(values, at, olds)
    return values


def _uncovered(values: Tensor, indices: Tensor, covered: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor:
    for at, olds in covered:
        if at is None:
            values = bits.gather(olds, indices)
        elif at.numel():
            places = torch.searchsorted(at, indices).clamp_(max=at.numel() - 1)
            hit = at[places] == indices
            bits.int_view(values)[hit] = bits.int_view(olds)[places[hit]]
    return values


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
