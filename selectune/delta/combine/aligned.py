"""Several deltas of one base, aligned tensor by tensor: the places that each of them writes, and the base's values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor, nn

from selectune import bits
from selectune.bits import dtype_name, int_view
from selectune.delta.delta import Delta
from selectune.delta.file.fingerprint import Inventory, unwrapped
from selectune.delta.file.parts import Dense, Part, Patch
from selectune.delta.live import door
from selectune.delta.live.base_check import check_base, check_structure
from selectune.delta.live.layers import Layer, base_at, ready, stack_of
from selectune.errors import BaseMismatchError, ConfigError, DeltaError, NonFiniteError


@dataclass(frozen=True, eq=False)
class Rows:
    """One tensor in k deltas, at the n places that any of them writes."""

    name: str
    kind: str  # "parameter" or "buffer"
    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: bool  # some delta records the tensor whole: then n is its size
    indices: Tensor  # (n,) int64, rising
    base: Tensor  # (n,)
    new: Tensor  # (k, n): the base where a delta does not write
    at: tuple[Tensor | None, ...]  # for each delta the columns it writes, None if it does not have the tensor
    old_values: bool  # every delta carries the base's values, so the result does too
    stored: str | None = None  # the digest of a quantised weight: values are offsets beside it, and the base is 0

    @property
    def changed(self) -> Tensor:
        """(k, n): whether a delta's bits differ from the base's."""
        return int_view(self.new) != int_view(self.base)

    @property
    def written(self) -> Tensor:
        """(k, n): whether a delta writes there."""
        found = torch.zeros(self.new.shape, dtype=torch.bool)
        for row, at in zip(found, self.at, strict=True):
            if at is not None:
                row[at] = True
        return found

    @property
    def differences(self) -> Tensor:
        """(k, n) float64: new - base; 0 where the bits agree, also of a NaN; 1 for a complex number that differs."""
        if self.dtype.is_complex:
            return self.changed.double()
        return torch.where(self.changed, self.new.double() - self.base.double(), 0.0)


def as_deltas(deltas: Any) -> list[Delta]:
    """The deltas as a list; raises ConfigError for anything but deltas, and for an empty list."""
    found = [deltas] if isinstance(deltas, Delta) else list(deltas)
    for delta in found:
        if not isinstance(delta, Delta):
            raise ConfigError(f"deltas are expected, as selectune.load(path) returns them; got {type(delta).__name__}.")
    if not found:
        raise ConfigError("at least one delta is needed; got none.")
    return found


def align(deltas: Sequence[Delta], base: nn.Module | None = None) -> list[Rows]:
    """Every tensor that any delta writes, in the model's order as far as it is known. O(B) memory per delta.

    The base's values are those of `base` (without the deltas applied to it), or the old values that the deltas carry.
    Raises BaseMismatchError for deltas of different bases or shapes, DeltaError where the base is unknown.
    """
    if base is None:
        return _align(deltas, None)
    with door.beside(door.claim_of(unwrapped(base)), "reading the base of a sum of deltas"):
        return _align(deltas, base)


def _align(deltas: Sequence[Delta], base: nn.Module | None) -> list[Rows]:
    check_shapes(deltas)
    found, layers = (None, []) if base is None else (ready(base), list(stack_of(base)))
    check_one_base(deltas, checked=found is not None)
    for number, delta in enumerate(deltas):
        if found is not None:
            check_structure(delta, found)
            check_base(delta, found, under=layers, whole=True)
        elif delta.parts and not delta.reversible:
            raise DeltaError(
                f"differences need the base's values, and number {number + 1}, {delta.label}, does not carry them: "
                "pass base=the base model, or save the delta with old_values=True; on the command line give --model"
            )
    parts = [{part.name: part for part in delta.parts} for delta in deltas]
    old = all(delta.reversible for delta in deltas)
    return [_rows(name, [own.get(name) for own in parts], found, layers, old) for name in _order(deltas, found)]


def check_shapes(deltas: Sequence[Delta]) -> None:
    """Raise BaseMismatchError where a tensor has different shapes, dtypes or kinds in two deltas."""
    seen: dict[str, tuple[str, str]] = {}
    for delta in deltas:
        for part in delta.parts:
            now = f"{part.kind} {dtype_name(part.dtype)} {part.shape}"
            if isinstance(part, Patch) and part.beside:
                now = f"quantised {part.kind} {part.shape}"
            before, label = seen.setdefault(part.name, (now, delta.label))
            if before != now:
                raise BaseMismatchError(
                    f'"{part.name}" is a {now} in {delta.label}, but a {before} in {label}; deltas can be combined if '
                    "they were made on one base"
                )


def check_one_base(deltas: Sequence[Delta], checked: bool = False) -> None:
    """Raise BaseMismatchError where two deltas have contradicting records of their bases.

    `checked`: a base model is at hand and decides, so names (a path and a hub id) may differ.
    """
    first, infos = deltas[0], [delta.info["base"] for delta in deltas]
    fresh: dict[str, str] = {}
    weights: dict[tuple[frozenset[str], bool], str | None] = {}
    for delta, info in zip(deltas, infos, strict=True):
        why = None
        if info["structure"] != infos[0]["structure"]:
            why = "their bases have different tensors, shapes, dtypes or ties (another architecture, head or dtype)"
        for row in info["initialised"]:
            if fresh.setdefault(row["name"], row["digest"]) != row["digest"]:
                why = f'"{row["name"]}", which no checkpoint holds, was drawn otherwise (another seed)'
        over = (
            frozenset(row["name"] for row in info["initialised"]),
            "model" in delta.info,
        )  # the digest is over all others
        before = weights.get(over)
        if None not in (before, info["weights"]) and before != info["weights"]:
            why = "the weights of their bases have different digests"
        weights[over] = before or info["weights"]
        sure = checked or (info["weights"] is not None and info["weights"] == infos[0]["weights"])
        for key in ("id", "revision"):
            if not why and not sure and None not in (info[key], infos[0][key]) and info[key] != infos[0][key]:
                why = (
                    f"their bases are recorded as {infos[0][key]} and {info[key]}; if these are one model, pass it as "
                    f"base= and its bits decide"
                )
        if delta.info.get("module") != first.info.get("module"):
            why = "they were trained with different adapters on the base, or one of them without"
        if why:
            raise BaseMismatchError(f"{first.label} and {delta.label} cannot be combined: {why}")


def base_of(deltas: Sequence[Delta]) -> dict[str, Any]:
    """`info["base"]` of the one base, from the records of all deltas."""
    infos = [delta.info["base"] for delta in deltas]

    def first(key: str) -> Any:
        return next((info[key] for info in infos if info[key] is not None), None)

    fresh = {row["name"]: row for info in infos for row in info["initialised"]}
    drawn = next((info["seed"] for info in infos if info["initialised"]), None)
    return {
        "id": first("id"),
        "revision": first("revision"),
        "seed": first("seed") if drawn is None else drawn,
        "initialised": [fresh[name] for name in sorted(fresh)],
        "structure": infos[0]["structure"],
        "weights": next((i["weights"] for i in infos if i["weights"] and len(i["initialised"]) == len(fresh)), None),
    }


def part_of(rows: Rows, keep: Tensor | None, values: Tensor) -> Part:
    """A delta's part from values (n,) at the rows' places; a patch holds only those that `keep` (n,) allows."""
    if rows.whole:
        tensor, base = values.view(rows.shape), rows.base.view(rows.shape)
        return Dense.make(rows.name, rows.kind, tensor, base, old_values=rows.old_values)
    indices, base = rows.indices, rows.base
    if keep is not None:
        where = keep.nonzero()[:, 0]
        indices, values, base = indices[where], bits.gather(values, where), bits.gather(base, where)
    if rows.stored is not None:
        return Patch(rows.name, rows.shape, values.dtype, indices, values, rows.stored, beside=True)
    return Patch.make(rows.name, rows.shape, indices, values, base, old_values=rows.old_values)


def check_finite_base(rows: Rows, where: Tensor) -> None:
    """Raise NonFiniteError if the base is NaN or infinite at one of the places `where` (n,)."""
    if not rows.dtype.is_floating_point or not bool(where.any()):
        return
    bad = where & ~torch.isfinite(rows.base.double())
    if bool(bad.any()):
        at = int(bad.int().argmax())
        raise NonFiniteError(
            f'the base of "{rows.name}" holds {rows.base.double()[at].item()} at entry {int(rows.indices[at])}, so '
            f"there is no difference to compute with; expected finite base values wherever deltas meet or are scaled"
        )


def _order(deltas: Sequence[Delta], found: Inventory | None) -> list[str]:
    """Names in the model's order, or in one that agrees with the order of every delta."""
    names = {part.name: None for delta in deltas for part in delta.parts}
    if found is not None:
        rank = {name: number for number, entry in enumerate(found.entries) for name in entry.names}
        return sorted(names, key=lambda name: rank[name])
    before: dict[str, set[str]] = {name: set() for name in names}
    for delta in deltas:
        for parts in (delta.patches, delta.dense):
            for one, after in itertools.pairwise(parts):
                before[after.name].add(one.name)
    try:
        return list(TopologicalSorter({name: sorted(above) for name, above in before.items()}).static_order())
    except CycleError:  # the same tensors, registered in another order
        return list(names)


def _rows(name: str, parts: list[Part | None], found: Inventory | None, layers: list[Layer], old: bool) -> Rows:
    some = next(part for part in parts if part is not None)
    numel = math.prod(some.shape)
    places = [part.where for part in parts if part is not None]
    whole = any(where is None for where in places)
    indices = torch.arange(numel) if whole else torch.cat([at for at in places if at is not None]).unique()
    at = tuple(None if part is None else _columns(part, indices, numel) for part in parts)
    stored = _stored(name, parts)
    if found is not None and stored is None:
        base = base_at(found.find[name], indices, layers)
    else:
        base = _carried_base(name, some.dtype, parts, at, len(indices))
    new = int_view(base).repeat(len(parts), 1)
    for row, part, columns in zip(new, parts, at, strict=True):
        if part is not None and columns is not None:
            row[columns] = int_view(part.new).reshape(-1)
    return Rows(name, some.kind, some.shape, some.dtype, whole, indices, base, new.view(base.dtype), at, old, stored)


def _stored(name: str, parts: list[Part | None]) -> str | None:
    """The digest of the quantised weight that offsets lie beside; None if there is none."""
    found = {part.base_digest for part in parts if isinstance(part, Patch) and part.beside}
    if len(found) > 1:
        raise BaseMismatchError(
            f'the deltas lie beside other stored bits of "{name}" ({", ".join(sorted(found))}); deltas can be combined '
            "if they were made on one base, quantised in one way"
        )
    return next(iter(found), None)


def _columns(part: Part, indices: Tensor, numel: int) -> Tensor:
    return torch.arange(numel) if part.where is None else torch.searchsorted(indices, part.where)


def _carried_base(
    name: str, dtype: torch.dtype, parts: list[Part | None], at: tuple[Tensor | None, ...], n: int
) -> Tensor:
    """The old values that the deltas carry, which must agree wherever two of them write."""
    base = torch.zeros(n, dtype=dtype)
    known, seen = int_view(base), torch.zeros(n, dtype=torch.bool)
    for part, columns in zip(parts, at, strict=True):
        if part is None or part.old is None or columns is None:
            continue
        own = int_view(part.old).reshape(-1)
        if bool((seen[columns] & (known[columns] != own)).any()):
            raise BaseMismatchError(
                f'the deltas carry different base values of "{name}", so they were made on different bases; deltas '
                f"can be combined if they were made on one base"
            )
        known[columns] = own
        seen[columns] = True
    return base
