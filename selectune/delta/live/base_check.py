"""Whether a model is the base of a delta, and advice if it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selectune import bits
from selectune.bits import dtype_name, same_bits
from selectune.delta.file.content import Content
from selectune.delta.file.fingerprint import (
    Entry,
    Inventory,
    adapter_digest,
    digest_bits,
    is_weights,
    never_loaded,
    structure_of,
)
from selectune.delta.file.parts import Patch
from selectune.delta.live.layers import Layer, base_at
from selectune.errors import BaseMismatchError, DeltaStateError
from selectune.files.reading import some


def check_structure(delta: Content, found: Inventory) -> None:
    """Raise BaseMismatchError unless the model has the base's tensors, shapes, dtypes and ties."""
    problems, hints = [], []
    owners: dict[str, str] = {}
    for part in delta.parts:
        entry = found.find.get(part.name)
        if entry is None:
            problems.append(f'"{part.name}" is missing')
            continue
        got = tuple(entry.tensor.shape)
        if got != part.shape:
            problems.append(f'"{part.name}" has shape {got}, expected {part.shape}')
            if len(got) == len(part.shape) and got[1:] == part.shape[1:]:
                hints.append(
                    "a first dimension that differs alone often means a resized vocabulary or another "
                    "number of labels: resize the model as the base was"
                )
        if isinstance(part, Patch) and part.beside != (entry.quantised is not None):
            now, then = ("", "not ") if entry.quantised is not None else ("not ", "")
            problems.append(f'"{part.name}" is {now}quantised here, and {then}quantised in the base')
            hints.append("quantise the model as the base was: the delta's values were trained on those bits")
        elif entry.tensor.dtype != part.dtype:
            now, then = dtype_name(entry.tensor.dtype), dtype_name(part.dtype)
            problems.append(f'"{part.name}" has dtype {now}, expected {then}')
            hints.append("load the model in the dtype that the base had: a delta holds the bits of that dtype")
        other = owners.setdefault(entry.name, part.name)
        if other != part.name:
            problems.append(f'"{part.name}" and "{other}" are one tensor here, but two in the base')
        if 0 in entry.tensor.stride() and entry.tensor.numel() > 1:
            problems.append(f'"{part.name}" is an expanded view: several of its entries share memory')
    if not problems and structure_of(found) != delta.info["base"]["structure"]:
        problems.append(
            "the tensors that the delta writes are there, but the model has others, or fewer, or other "
            "shapes, dtypes or ties among them"
        )
        hints.append("load the same architecture, with the same head and the same tied weights")
    adapter = delta.info.get("module")
    if problems and adapter is not None:
        hints.append(
            f"the delta was trained on a model that carried {adapter['kind']}: "
            "selectune.adapters.rebuild(model, delta) puts it on the base"
        )
    _refuse(problems, hints)


def check_base(delta: Content, found: Inventory, under: Sequence[Layer] = (), whole: bool = False) -> None:
    """Raise BaseMismatchError unless the model holds the base's bits wherever the delta writes.

    A tensor that no checkpoint held and that the delta stores whole may hold anything, since nothing of it stays.
    `whole` checks those tensors too, for arithmetic on their old values. The check ignores the layers `under`: it
    compares the values that they cover.
    """
    fresh = fresh_digests(delta, found, whole)
    bad_fresh, bad_adapter = drawn(fresh, delta.info.get("module"), found, under)
    problems, names = [*bad_fresh, *bad_adapter], set()
    replaced = set() if whole else _replaced(delta, found)
    for part in delta.parts:
        entry = found.find[part.name]
        if part.where is None and (entry.name in replaced or fresh.get(part.name) == part.base_digest):
            continue  # it may hold anything, or `drawn` has compared it
        if isinstance(part, Patch) and part.beside:
            if entry.quantised is None or entry.quantised.digest() != part.base_digest:
                problems.append(f'"{part.name}" is stored in other bits')
            elif bool(bits.int_view(base_at(entry, part.where, under)).any()):
                problems.append(f'"{part.name}" has values beside it already')
        elif digest_bits(base_at(entry, part.where, under)) != part.base_digest:
            places = "" if part.where is None else f" at the {part.where.numel()} trained places"
            problems.append(f'"{part.name}" differs{places}')
            names.add(entry.name)
    if problems:
        _refuse(problems, _hints(delta, found, bool(bad_fresh), names))


def fresh_digests(delta: Content, found: Inventory, whole: bool = False) -> dict[str, str]:
    """{name: digest} of the tensors that no checkpoint held and that must be drawn again.

    Those that the delta stores whole are left out, unless `whole`.
    """
    replaced = set() if whole else _replaced(delta, found)
    rows = delta.info["base"]["initialised"]
    return {
        row["name"]: row["digest"]
        for row in rows
        if row["name"] not in found.find or found.find[row["name"]].name not in replaced
    }


def drawn(
    fresh: Mapping[str, str], adapter: Mapping[str, str] | None, found: Inventory, under: Sequence[Layer]
) -> tuple[list[str], list[str]]:
    """Faults of the tensors that no checkpoint held, and of the adapter that the delta was trained with."""
    problems = []
    for name, digest in fresh.items():
        entry = found.find.get(name)
        if entry is None:
            problems.append(f'"{name}" is missing')
        elif _whole(entry, under) != digest:
            problems.append(f'"{name}" was initialised otherwise')
    if adapter is None:
        return problems, []
    on = found.adapter
    if on is None:
        return problems, [f"no adapter is on record for the model, but the delta was trained with {adapter['kind']}"]
    if adapter_digest(found, on.markers, lambda entry: _whole(entry, under)) == adapter["digest"]:
        return problems, []
    return problems, [f"the {on.kind} on the model was initialised otherwise"]


def _whole(entry: Entry, under: Sequence[Layer]) -> str:
    """The digest of a tensor as it is without the layers `under`."""
    return entry.digest() if entry.quantised is not None else digest_bits(base_at(entry, None, under))


def _replaced(delta: Content, found: Inventory) -> set[str]:
    """Names of the model's tensors that no checkpoint of the base held and that the delta stores whole."""
    stored = {found.find[dense.name].name for dense in delta.dense if dense.name in found.find}
    fresh = {row["name"] for row in delta.info["base"]["initialised"]}
    return stored & {found.find[name].name for name in fresh if name in found.find}


def _hints(delta: Content, found: Inventory, drawn_otherwise: bool, differ: set[str]) -> list[str]:
    """Advice about a model that differs from the base in the tensors `differ`."""
    base, adapter, hints = delta.info["base"], delta.info.get("module"), []
    if all(same_bits(base_at(found.find[part.name], part.where), part.new) for part in delta.parts):
        hints.append(
            "the model holds this delta's values already: it was applied or merged before, or the model is "
            "the tuned one"
        )
    if adapter is not None:
        hints.append(
            f"selectune.adapters.rebuild(model, delta) draws its {adapter['kind']} from seed {adapter['seed']}"
        )
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


def check_weights(delta: Content, found: Inventory) -> None:
    """Raise BaseMismatchError unless every bit of the model is the base's (one read of all weights)."""
    base = delta.info["base"]
    if base["weights"] is None:
        raise DeltaStateError(
            "the delta carries no digest of all weights, so a full check is impossible; "
            "save it with full=True, or check without full"
        )
    if not is_weights(found, base):
        _refuse(
            ["some weight differs, perhaps one that the delta does not write"],
            [f"the delta was made on {base['id'] or 'an unnamed base'}; load exactly that"],
        )


def _refuse(problems: list[str], hints: list[str]) -> None:
    if problems:
        raise BaseMismatchError(
            f"the model is not the base of this delta: {some(problems)}. "
            f"Nothing was changed. {'. '.join(dict.fromkeys(hints))}".rstrip()
        )
