"""Apply, revert and merge: a delta goes onto a model and comes off again, every bit of it or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident

from torch import nn

from selectune.bits import same_bits
from selectune.delta.file.content import Content, refuse_beside
from selectune.delta.file.fingerprint import Inventory
from selectune.delta.live.base_check import check_base, check_structure, check_weights
from selectune.delta.live.door import Claim
from selectune.delta.live.layers import (
    Covered,
    Layer,
    base_at,
    check_sharing,
    copied,
    exclusive,
    forget_undone,
    ready,
    stack_of,
)
from selectune.delta.live.writing import Write, write_all
from selectune.errors import DeltaError, DeltaStateError
from selectune.files.reading import some


def apply(delta: Content, model: nn.Module, stack: bool = False, full: bool = False) -> None:
    """See `Delta.apply`."""
    with exclusive(model, "apply") as hold:
        found, layers = ready(model), stack_of(model)
        forget_undone(layers, found)
        if any(layer.digest == delta.digest for layer in layers):
            raise DeltaStateError(f"{delta.label} is applied to this model already; revert it before applying it again")
        if layers and not stack:
            raise DeltaStateError(
                f"{layers[-1].label} is applied to this model; revert it first, or pass stack=True to put "
                f"{delta.label} on top of it"
            )
        if not stack:
            check_sharing(model, hold.claim)
        _check_fits(delta, found, layers, full)
        made = writes(delta, found)
        write_all(made, layers, [*layers, layer_of(delta, made, hold.claim)])


def _check_fits(delta: Content, found: Inventory, layers: Sequence[Layer], full: bool) -> None:
    check_structure(delta, found)
    if full and layers:
        raise DeltaStateError("a full check needs the bare base; revert the deltas that are applied first")
    try:
        check_base(delta, found)
    except DeltaError:
        if not layers:
            raise
        check_base(delta, found, under=layers)
    if full:
        check_weights(delta, found)


def revert(delta: Content, model: nn.Module) -> None:
    """See `Delta.revert`."""
    with exclusive(model, "revert"):
        found, layers = ready(model), stack_of(model)
        if layers and layers[-1].digest == delta.digest:
            write_all(undo(delta, found, layers[-1].olds), layers, layers[:-1])
            return
        if layers:
            below = any(layer.digest == delta.digest for layer in layers)
            raise DeltaStateError(
                f"cannot revert {delta.label}: {'it lies under' if below else 'it is not applied, but'} "
                f"{layers[-1].label}{'' if below else ' is'}; revert that first (applied here, oldest first: "
                f"{', '.join(layer.label for layer in layers)})"
            )
        if not delta.reversible:
            raise DeltaStateError(
                f"cannot revert {delta.label}: it is not applied to this model (or was reverted already), and "
                f"it does not carry the base's values, as one saved with old_values=True does"
            )
        _revert_merged(delta, found)


def _revert_merged(delta: Content, found: Inventory) -> None:
    check_structure(delta, found)
    olds: Covered = {found.find[p.name].name: (p.where, p.old) for p in delta.parts if p.old is not None}
    changes = any(not same_bits(part.old, part.new) for part in delta.parts if part.old is not None)
    if not changes or moved(delta, found):
        raise DeltaStateError(
            f"cannot revert {delta.label}: it is not applied to this model, which does not hold its values"
        )
    write_all(undo(delta, found, olds), [], [])


def merge(delta: Content, model: nn.Module) -> None:
    """See `Delta.merge`."""
    refuse_beside(delta, "merged into its base")
    with exclusive(model, "merge"):
        layers = stack_of(model)
        if [layer.digest for layer in layers] == [delta.digest]:
            check_moved(delta, ready(model))
        elif layers:
            raise DeltaStateError(
                f"cannot merge {delta.label} while other deltas are applied: "
                f"{', '.join(layer.label for layer in layers)}; revert them first"
            )
        else:
            apply(delta, model)
        layers.clear()


@contextmanager
def applied(delta: Content, model: nn.Module, stack: bool = False) -> Iterator[nn.Module]:
    """See `Delta.applied`."""
    with exclusive(model, "applied()") as hold:
        apply(delta, model, stack)
        try:
            yield model
        finally:
            hold.thread = get_ident()  # a block may end in another thread than it began in
            revert(delta, model)


# --- the writes of a delta ----------------------------------------------------------------------------------


def writes(delta: Content, found: Inventory, under: Sequence[Layer] = ()) -> list[Write]:
    """The writes that put the delta on the model; their old values are those without the layers `under`."""
    made = []
    for part in delta.parts:
        entry = found.find[part.name]
        old = base_at(entry, part.where, under)
        made.append(Write(entry.name, entry.tensor, part.where, part.new, copied(old) if part.where is None else old))
    return made


def layer_of(delta: Content, made: Sequence[Write], claim: Claim, name: str = "") -> Layer:
    """The record of an applied delta."""
    changes = any(not same_bits(write.old, write.new) for write in made)
    olds = {write.name: (write.indices, write.old) for write in made}
    return Layer(delta.digest, delta.label, olds, changes, claim, name)


def undo(delta: Content, found: Inventory, olds: Covered) -> list[Write]:
    """The writes that take the delta off again; raises DeltaStateError if the model does not hold its values."""
    check_moved(delta, found)
    return [Write(w.name, w.tensor, w.indices, olds[w.name][1], w.old) for w in writes(delta, found)]


def moved(delta: Content, found: Inventory) -> list[str]:
    """The places where the model does not hold the delta's values any more."""
    problems = []
    for part in delta.parts:
        entry = found.find.get(part.name)
        if entry is None or tuple(entry.tensor.shape) != part.shape or entry.tensor.dtype != part.dtype:
            problems.append(f'"{part.name}" has another shape or dtype, or is gone')
    return problems or [
        f'"{write.name}" has other values' for write in writes(delta, found) if not same_bits(write.old, write.new)
    ]


def check_moved(delta: Content, found: Inventory) -> None:
    """Raise DeltaStateError unless the model still holds the delta's values."""
    problems = moved(delta, found)
    if problems:
        raise DeltaStateError(
            f"the model changed since the delta was applied, so it cannot be reverted exactly: "
            f"{some(problems)}. Nothing was changed"
        )
