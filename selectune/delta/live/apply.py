"""Deltas on a live model: what lies on it, what it must look like, and writing all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from selectune import bits
from selectune.bits import dtype_name, same_bits
from selectune.delta.file.adapter_record import module_digest
from selectune.delta.file.fingerprint import (
    Entry,
    Inventory,
    _structure,
    digest_bits,
    inventory,
    is_weights,
    never_loaded,
    unwrapped,
)
from selectune.delta.file.parts import Dense, Patch
from selectune.delta.live.door import Claim, Hold, alone, claim_of
from selectune.delta.live.writing import SHOWN, Write
from selectune.errors import BaseMismatchError, DeltaStateError

if TYPE_CHECKING:
    from selectune.delta.delta import Delta


@dataclass(frozen=True, eq=False)
class Layer:
    """One applied delta: its digest, a label for messages, and the values it covered, by tensor name."""

    digest: str
    label: str
    olds: dict[str, tuple[Tensor | None, Tensor]]  # name: (indices or None for all, old values)
    changes: bool  # whether any bit differed
    claim: Claim  # of the model, as it was when the delta was applied
    name: str = ""  # what the shelf that put it there calls it


_STACKS: WeakKeyDictionary[nn.Module, list[Layer]] = WeakKeyDictionary()
_STACKS_LOCK = RLock()


def stack_of(model: nn.Module) -> list[Layer]:
    """The deltas applied to a model, oldest first; the list itself."""
    with _STACKS_LOCK:
        return _STACKS.setdefault(unwrapped(model), [])


def exclusive(model: nn.Module, what: str, timeout: float | None = None) -> AbstractContextManager[Hold]:
    """A block in which no other thread reads through a shelf's door or writes weights of the model; may be nested.

    That holds for a part of the model, for a whole that it is a part of, and for models that share a weight with it,
    as they are made when the block is entered. Raises as `door.enter` does.
    """
    return alone(claim_of(unwrapped(model)), what, timeout)


def besides(model: nn.Module, claim: Claim) -> tuple[nn.Module, list[Layer]] | None:
    """Another model that shares weights with this one and has a delta applied, with its stack; or None."""
    model = unwrapped(model)
    with _STACKS_LOCK:
        others = [(other, stack) for other, stack in _STACKS.items() if stack and other is not model]
    for other, stack in others:
        # what the delta saw may be out of date, so that it has to be true of the other model as it is now as well
        if any(layer.claim.meets(claim) for layer in stack[-1:]) and claim_of(other).meets(claim):
            return other, stack
    return None


def check_besides(model: nn.Module, claim: Claim) -> None:
    """Raise DeltaStateError if a delta is applied to another model that shares weights with this one."""
    found = besides(model, claim)
    if found is None:
        return
    other, stack = found
    forget_undone(stack, inventory(other))
    if stack:
        raise DeltaStateError(
            f"{stack[-1].label} is applied to a model that shares weights with this one (a part of it, a whole that it "
            f"belongs to, or one with tied weights); revert it there first, or switch its shelf to None"
        )
    check_besides(model, claim)


def ready(model: nn.Module) -> Inventory:
    """The model's tensors; raises DeltaStateError while a tuner is attached."""
    found = inventory(model)
    if found.attached:
        raise DeltaStateError(
            "a tuner is attached to the model, which may move its weights at any step; call tuner.detach() before "
            "deltas are applied or reverted (or selectune.strip(model), if it is a copy of an attached model)"
        )
    return found


def forget_undone(stack: list[Layer], found: Inventory) -> None:
    """Drop the topmost layers whose old values are back in the model, as after loading a state dict."""
    while (
        stack
        and stack[-1].changes
        and all(
            name in found.find and _equals(found.find[name].tensor, where, old)
            for name, (where, old) in stack[-1].olds.items()
        )
    ):
        stack.pop()


def _equals(tensor: Tensor, where: Tensor | None, old: Tensor) -> bool:
    if where is None:
        return same_bits(tensor, old)
    return bool(where[-1] < tensor.numel()) and same_bits(bits.gather(tensor, where), old)


# --- checks -------------------------------------------------------------------------------------------------


def check_structure(delta: Delta, found: Inventory) -> None:
    """Raise BaseMismatchError unless the model has the base's tensors, shapes, dtypes and ties."""
    problems, hints = [], []
    owners: dict[str, str] = {}
    for part, shape, dtype in _parts(delta):
        entry = found.find.get(part.name)
        if entry is None:
            problems.append(f'"{part.name}" is missing')
            continue
        got = tuple(entry.tensor.shape)
        if got != shape:
            problems.append(f'"{part.name}" has shape {got}, expected {shape}')
            if len(got) == len(shape) and got[1:] == shape[1:]:
                hints.append(
                    "a first dimension that differs alone often means a resized vocabulary or another "
                    "number of labels: resize the model as the base was"
                )
        if entry.tensor.dtype != dtype:
            problems.append(f'"{part.name}" has dtype {dtype_name(entry.tensor.dtype)}, expected {dtype_name(dtype)}')
            hints.append("load the model in the dtype that the base had: a delta holds the bits of that dtype")
        other = owners.setdefault(entry.name, part.name)
        if other != part.name:
            problems.append(f'"{part.name}" and "{other}" are one tensor here, but two in the base')
        if 0 in entry.tensor.stride() and entry.tensor.numel() > 1:
            problems.append(f'"{part.name}" is an expanded view: several of its entries share memory')
    if not problems and _structure(found) != delta.info["base"]["structure"]:
        problems.append(
            "the tensors that the delta writes are there, but the model has others, or fewer, or other "
            "shapes, dtypes or ties among them"
        )
        hints.append("load the same architecture, with the same head and the same tied weights")
    module = delta.info.get("module")
    if problems and module is not None:
        hints.append(
            f"the delta was trained on a model that carried {module['kind']}: selectune.adapters.rebuild(model, delta) "
            "puts it on the base"
        )
    _refuse(problems, hints)


def drawn(
    fresh: Mapping[str, str], module: Mapping[str, Any] | None, found: Inventory, under: Sequence[Layer]
) -> tuple[list[str], list[str]]:
    """What is wrong with the tensors that no checkpoint holds, and with the module on the model."""
    problems = []
    for name, digest in fresh.items():
        entry = found.find.get(name)
        if entry is None:
            problems.append(f'"{name}" is missing')
        elif digest_bits(_dense_base(entry, under)) != digest:
            problems.append(f'"{name}" was initialised otherwise')
    if module is None or module["digest"] == module_digest(
        module["kind"], found, lambda entry: _dense_base(entry, under)
    ):
        return problems, []
    return problems, [f"the {module['kind']} on the model was initialised otherwise"]


def check_base(delta: Delta, found: Inventory, under: Sequence[Layer] = (), whole: bool = False) -> None:
    """Raise BaseMismatchError unless the model holds the base's bits wherever the delta writes.

    Tensors that no checkpoint held and that the delta stores whole may hold anything: nothing of it stays. `whole`
    holds them to their digests too, for arithmetic on what they held. `under` are layers to look through: their
    covered values count as the model's.
    """
    base, module = delta.info["base"], delta.info.get("module")
    replaced = set() if whole else anew(delta, found)
    fresh = {row["name"]: row["digest"] for row in base["initialised"]}
    fresh = {n: digest for n, digest in fresh.items() if n not in found.find or found.find[n].name not in replaced}
    bad_fresh, bad_module = drawn(fresh, module, found, under)
    problems, names = [*bad_fresh, *bad_module], set()
    for patch in delta.patches:
        entry = found.find[patch.name]
        if patch.zeroed:
            if digest_bits(_dense_base(entry, under)) != patch.base_digest:
                problems.append(f'"{patch.name}" differs')
                names.add(entry.name)
        elif digest_bits(_base_at(entry, patch.indices, under)) != patch.base_digest:
            problems.append(f'"{patch.name}" differs at the {patch.indices.numel()} trained places')
            names.add(entry.name)
    for dense in delta.dense:
        entry = found.find[dense.name]
        if (
            entry.name not in replaced
            and fresh.get(dense.name) != dense.base_digest
            and digest_bits(_dense_base(entry, under)) != dense.base_digest
        ):
            problems.append(f'"{dense.name}" differs')
            names.add(entry.name)
    if problems:
        _refuse(problems, _hints(delta, found, bool(bad_fresh), names))


def anew(delta: Delta, found: Inventory) -> set[str]:
    """Names of the model's tensors that no checkpoint of the base held and that the delta stores whole."""
    stored = {found.find[dense.name].name for dense in delta.dense if dense.name in found.find}
    fresh = {row["name"] for row in delta.info["base"]["initialised"]}
    return stored & {found.find[name].name for name in fresh if name in found.find}


def _hints(delta: Delta, found: Inventory, drawn_otherwise: bool, differ: set[str]) -> list[str]:
    """What to do about a model that differs from the base in the tensors `differ`."""
    base, module, hints = delta.info["base"], delta.info.get("module"), []
    if holds(delta, found):
        hints.append(
            "the model holds this delta's values already: it was applied or merged before, or the model is "
            "the tuned one"
        )
    if module is not None:
        hints.append(f"selectune.adapters.rebuild(model, delta) draws its {module['kind']} from seed {module['seed']}")
    if drawn_otherwise and base["seed"] is None:
        hints.append(
            "these tensors come from no checkpoint but from a random generator, the delta does not store them whole, "
            "and no seed is recorded, so they cannot be made again: train them whole (Scope(train_fully=...)), or "
            "draw them from a seed and record it (base_info(model, seed=...))"
        )
    elif drawn_otherwise:
        hints.append(
            f"these tensors come from no checkpoint but from a random generator; the base drew them with "
            f"seed {base['seed']} (info['base']['seed'] matters): set it before the model is made, or let "
            f"selectune.load_model(path) make the model"
        )
    heads = sorted(differ.intersection(never_loaded(found)))
    if heads:
        hints.append(
            f'"{heads[0]}" comes from no checkpoint here but was drawn as the model was made, as a fresh head is, so '
            f"it differs in every process: selectune.load_model(path) makes base and head in one call; a delta that "
            f"stores such a tensor whole takes any if it is named at save, "
            f"tuner.save(path, base=base_info(model, initialised=[...]))"
        )
    if not hints:
        where = f"{base['id'] or 'unnamed'}, revision {base['revision'] or 'unknown'}"
        hints.append(f"the delta was made on {where}; load exactly that, without another delta or further training")
    return hints


def check_weights(delta: Delta, found: Inventory) -> None:
    """Raise BaseMismatchError unless every bit of the model is the base's (one read of all weights)."""
    expected = delta.info["base"]["weights"]
    if expected is None:
        raise DeltaStateError(
            "the delta carries no digest of all weights, so a full check is impossible; "
            "save it with full=True, or check without full"
        )
    if not is_weights(found, delta.info["base"]):
        _refuse(
            ["some weight differs, perhaps one that the delta does not write"],
            [f"the delta was made on {delta.info['base']['id'] or 'an unnamed base'}; load exactly that"],
        )


def holds(delta: Delta, found: Inventory) -> bool:
    """Whether the model has the delta's values, bit for bit, wherever the delta writes."""
    for write in writes(delta, found):
        if not same_bits(write.old, write.new):
            return False
    return True


def _refuse(problems: list[str], hints: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise BaseMismatchError(
            f"the model is not the base of this delta: {'; '.join(problems[:SHOWN])}{more}. "
            f"Nothing was changed. {'. '.join(dict.fromkeys(hints))}".rstrip()
        )


def _parts(delta: Delta) -> Iterator[tuple[Patch | Dense, tuple[int, ...], torch.dtype]]:
    for patch in delta.patches:
        yield patch, patch.shape, patch.dtype
    for dense in delta.dense:
        yield dense, tuple(dense.tensor.shape), dense.tensor.dtype


def _base_at(entry: Entry, indices: Tensor, under: Sequence[Layer]) -> Tensor:
    """The entry's values at `indices`, with the values that `under` covered put back (oldest last)."""
    values = bits.gather(entry.tensor, indices)
    for layer in reversed(under):
        where, olds = layer.olds.get(entry.name, (indices[:0], values[:0]))
        if where is None:
            values = bits.gather(olds, indices)
        elif where.numel():
            at = torch.searchsorted(where, indices).clamp_(max=where.numel() - 1)
            hit = where[at] == indices
            bits.int_view(values)[hit] = bits.int_view(olds)[at[hit]]
    return values


def _dense_base(entry: Entry, under: Sequence[Layer]) -> Tensor:
    touching = [layer.olds[entry.name] for layer in reversed(under) if entry.name in layer.olds]
    if not touching:
        return entry.tensor
    values = entry.tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    for where, olds in touching:
        if where is None:
            bits.overwrite(values, olds)
        else:
            bits.scatter(values, where, olds)
    return values


# --- writing ------------------------------------------------------------------------------------------------


def writes(delta: Delta, found: Inventory, under: Sequence[Layer] = ()) -> list[Write]:
    """The writes that put the delta on the model, with what is there now (or will be once `under` is off)."""
    made = []
    for patch in delta.patches:
        entry = found.find[patch.name]
        if patch.zeroed:
            made.append(_write_whole(entry, patch.whole(), under))
            continue
        old = _base_at(entry, patch.indices, under)
        made.append(Write(entry.name, entry.tensor, patch.indices, patch.values, old))
    return [*made, *(_write_whole(found.find[dense.name], dense.tensor, under) for dense in delta.dense)]


def _write_whole(entry: Entry, new: Tensor, under: Sequence[Layer]) -> Write:
    old = _dense_base(entry, under).detach().cpu().clone(memory_format=torch.contiguous_format)
    return Write(entry.name, entry.tensor, None, new, old)


def layer_of(delta: Delta, made: Sequence[Write], claim: Claim, name: str = "") -> Layer:
    """What to remember of an applied delta."""
    changes = any(not same_bits(write.old, write.new) for write in made)
    olds = {write.name: (write.indices, write.old) for write in made}
    return Layer(delta.digest, delta.label, olds, changes, claim, name)


def undo(delta: Delta, found: Inventory, olds: dict[str, tuple[Any, Tensor]]) -> list[Write]:
    """The writes that take the delta off again; raises DeltaStateError if the model has moved meanwhile."""
    check_moved(delta, found)
    made = []
    for write in writes(delta, found):
        made.append(Write(write.name, write.tensor, write.indices, olds[write.name][1], write.old))
    return made


def moved(delta: Delta, found: Inventory) -> list[str]:
    """Where the model does not hold the delta's values any more."""
    problems = []
    for part, shape, dtype in _parts(delta):
        entry = found.find.get(part.name)
        if entry is None or tuple(entry.tensor.shape) != shape or entry.tensor.dtype != dtype:
            problems.append(f'"{part.name}" has another shape or dtype, or is gone')
    return problems or [
        f'"{write.name}" has other values' for write in writes(delta, found) if not same_bits(write.old, write.new)
    ]


def check_moved(delta: Delta, found: Inventory) -> None:
    """Raise DeltaStateError unless the model still holds the delta's values."""
    problems = moved(delta, found)
    if problems:
        raise DeltaStateError(
            f"the model changed since the delta was applied, so it cannot be reverted exactly: "
            f"{'; '.join(problems[:SHOWN])}. Nothing was changed"
        )
