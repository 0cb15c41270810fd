"""Several deltas of one base side by side, tensor by tensor: who writes what, and the base under it."""

from __future__ import annotations

import itertools
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
from selectune.delta.file.parts import Dense, Patch
from selectune.delta.live import apply as live
from selectune.delta.live import door
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

    @property
    def changed(self) -> Tensor:
        """(k, n): whether a delta's bits differ from the base's."""
        return int_view(self.new) != int_view(self.base)

    @property
    def written(self) -> Tensor:
        """(k, n): whether a delta writes there at all."""
        found = torch.zeros(self.new.shape, dtype=torch.bool)
        for row, at in zip(found, self.at, strict=True):
            if at is not None:
                row[at] = True
        return found

    @property
    def differences(self) -> Tensor:
        """(k, n) float64: new - base; 0 where the bits agree, also on a NaN; 1 for a complex number that moved."""
        if self.dtype.is_complex:
            return self.changed.double()
        wide = self.new.double() - self.base.double()
        return torch.where(self.changed, wide, 0.0)


def as_deltas(deltas: Any) -> list[Delta]:
    """The deltas as a list; ConfigError for anything that is no delta, or for none at all."""
    found = [deltas] if isinstance(deltas, Delta) else list(deltas)
    for delta in found:
        if not isinstance(delta, Delta):
            raise ConfigError(f"deltas are expected, as selectune.load(path) returns them; got {type(delta).__name__}.")
    if not found:
        raise ConfigError("at least one delta is needed; got none.")
    return found


def align(deltas: Sequence[Delta], base: nn.Module | None = None) -> list[Rows]:
    """Every tensor that any delta writes, in the model's order as far as it is known. O(B) memory per delta.

    The base's values are those of `base` (looked at under applied deltas), or the old values that the deltas carry.
    Raises BaseMismatchError for deltas of different bases or shapes, DeltaError where the base is unknown.
    """
    if base is None:
        return _align(deltas, None)
    with door.beside(door.claim_of(unwrapped(base)), "reading the base of a sum of deltas"):
        return _align(deltas, base)


def _align(deltas: Sequence[Delta], base: nn.Module | None) -> list[Rows]:
    check_shapes(deltas)
    found, stack = None, []
    if base is not None:
        found, stack = live.ready(base), list(live.stack_of(base))
    check_one_base(deltas, checked=found is not None)
    for number, delta in enumerate(deltas):
        if found is not None:
            live.check_structure(delta, found)
            live.check_base(delta, found, under=stack, whole=True)
        elif not delta.reversible and (delta.patches or delta.dense):
            raise DeltaError(
                f"differences need the base's values, and number {number + 1}, {delta.label}, does not carry them: "
                "pass base=the base model, or save the delta with old_values=True; on the command line give --model"
            )
    parts = [{part.name: part for part in parts_of(delta)} for delta in deltas]
    return [_rows(name, [own.get(name) for own in parts], found, stack) for name in _order(deltas, found)]


def parts_of(delta: Delta) -> list[Patch | Dense]:
    """The delta's parts; a zeroed patch, which writes all of its tensor, as a dense one."""
    return [*(_whole(patch) if patch.zeroed else patch for patch in delta.patches), *delta.dense]


def _whole(patch: Patch) -> Dense:
    old = None if patch.base_values is None else patch.base_values.view(patch.shape)
    return Dense(patch.name, "parameter", patch.whole(), patch.base_digest, old)


def check_shapes(deltas: Sequence[Delta]) -> None:
    """Raise BaseMismatchError where a tensor has different shapes, dtypes or kinds in two deltas."""
    seen: dict[str, tuple[Any, str]] = {}
    for delta in deltas:
        for part in [*delta.patches, *delta.dense]:
            now = (_shape(part), dtype_name(_dtype(part)), _kind(part))
            before, label = seen.setdefault(part.name, (now, delta.label))
            if before != now:
                raise BaseMismatchError(
                    f'"{part.name}" is a {now[2]} {now[1]} {now[0]} in {delta.label}, but a {before[2]} {before[1]} '
                    f"{before[0]} in {label}; deltas can be combined if they were made on one base"
                )


def check_one_base(deltas: Sequence[Delta], checked: bool = False) -> None:
    """Raise BaseMismatchError where what two deltas record of their bases disagrees.

    `checked`: a base model is at hand and decides, so that names alone (a path and a hub id) may differ.
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
        over = (frozenset(row["name"] for row in info["initialised"]), "model" in delta.info)  # what the digest is over
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
            why = "they were trained with different modules on the base, or one of them without"
        if why:
            raise BaseMismatchError(f"{first.label} and {delta.label} cannot be combined: {why}")


def base_of(deltas: Sequence[Delta]) -> dict[str, Any]:
    """What is known of the one base, from all of them."""
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


def part_of(rows: Rows, keep: Tensor | None, values: Tensor, old_values: bool) -> Patch | Dense:
    """A delta's part out of values (n,) at the rows' places; `keep` (n,) leaves places out of a patch."""
    if rows.whole:
        tensor, base = values.view(rows.shape), rows.base.view(rows.shape)
        return Dense.make(rows.name, rows.kind, tensor, base, old_values=old_values)
    indices, base = rows.indices, rows.base
    if keep is not None:
        where = keep.nonzero()[:, 0]
        indices, values, base = indices[where], bits.gather(values, where), bits.gather(base, where)
    return Patch.make(rows.name, rows.shape, indices, values, base, old_values=old_values)


def check_finite_base(rows: Rows, where: Tensor) -> None:
    """Raise NonFiniteError if a difference is asked for at a place (n,) whose base is NaN or infinite."""
    if not rows.dtype.is_floating_point or not bool(where.any()):
        return
    bad = where & ~torch.isfinite(rows.base.double())
    if bool(bad.any()):
        at = int(bad.int().argmax())
        raise NonFiniteError(
            f'the base of "{rows.name}" holds {rows.base.double()[at].item()} at entry {int(rows.indices[at])}, so '
            f"there is no difference to compute with; expected finite base values wherever deltas meet or are scaled"
        )


def _shape(part: Patch | Dense) -> tuple[int, ...]:
    return part.shape if isinstance(part, Patch) else tuple(part.tensor.shape)


def _dtype(part: Patch | Dense) -> torch.dtype:
    return part.dtype if isinstance(part, Patch) else part.tensor.dtype


def _kind(part: Patch | Dense) -> str:
    return "parameter" if isinstance(part, Patch) else part.kind


def _order(deltas: Sequence[Delta], found: Inventory | None) -> list[str]:
    """Names in the model's order, or in one that agrees with the order of every delta."""
    names = {part.name: None for delta in deltas for part in [*delta.patches, *delta.dense]}
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


def _rows(name: str, parts: list[Patch | Dense | None], found: Inventory | None, stack: list[live.Layer]) -> Rows:
    some = next(part for part in parts if part is not None)
    numel = torch.Size(_shape(some)).numel()
    whole = any(isinstance(part, Dense) for part in parts)
    if whole:
        indices = torch.arange(numel)
    else:
        indices = torch.cat([part.indices for part in parts if isinstance(part, Patch)]).unique()
    at = tuple(None if part is None else _columns(part, indices, numel) for part in parts)
    if found is not None:
        base = live._base_at(found.find[name], indices, stack)
    else:
        base = _carried_base(name, parts, at, len(indices))
    new = int_view(base).repeat(len(parts), 1)
    for row, part, columns in zip(new, parts, at, strict=True):
        if part is not None and columns is not None:
            row[columns] = int_view(part.values if isinstance(part, Patch) else part.tensor).reshape(-1)
    return Rows(name, _kind(some), _shape(some), _dtype(some), whole, indices, base, new.view(base.dtype), at)


def _columns(part: Patch | Dense, indices: Tensor, numel: int) -> Tensor:
    return torch.searchsorted(indices, part.indices) if isinstance(part, Patch) else torch.arange(numel)


def _carried_base(name: str, parts: list[Patch | Dense | None], at: tuple[Tensor | None, ...], n: int) -> Tensor:
    """The old values that the deltas carry, which must agree wherever two of them write."""
    known: Tensor | None = None
    seen = torch.zeros(n, dtype=torch.bool)
    dtype = torch.float32
    for part, columns in zip(parts, at, strict=True):
        old = None if part is None else part.base_values if isinstance(part, Patch) else part.base_tensor
        if old is None or columns is None:
            continue
        dtype, own = old.dtype, int_view(old).reshape(-1)
        known = torch.zeros(n, dtype=own.dtype) if known is None else known
        if bool((seen[columns] & (known[columns] != own)).any()):
            raise BaseMismatchError(
                f'the deltas carry different base values of "{name}", so they were made on different bases; deltas '
                f"can be combined if they were made on one base"
            )
        known[columns] = own
        seen[columns] = True
    return (torch.zeros(n, dtype=torch.int32) if known is None else known).view(dtype)
