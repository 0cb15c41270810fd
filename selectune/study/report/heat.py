"""Where the selected scalars are: tensors by layer and kind, read off deltas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune.delta import DELTA_FILE, load
from selectune.errors import SelectuneError
from selectune.study.report.material import number

LARGEST = 1 << 28
"""Bytes of a delta that is read for a map."""

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Spot:
    """One tensor: `count` of its `numel` scalars were selected; `whole`: it was trained densely.

    `first`: the rank of its first scalar in the order of selection, if the delta keeps that; `step`: when that was.
    """

    name: str
    count: int
    numel: int
    whole: bool
    first: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class HeatMap:
    """The tensors of one run's delta. `rows`: {kind of tensor: its spot in each layer, None if nothing is selected}.

    `outside`: tensors of no layer. `why`: a sentence in place of a map.
    """

    label: str
    about: str
    layers: tuple[str, ...] = ()
    rows: Mapping[str, tuple[Spot | None, ...]] | None = None
    outside: tuple[Spot, ...] = ()
    ordered: bool = False
    why: str = ""

    @property
    def inside(self) -> int:
        """The scalars in layers."""
        return sum(spot.count for row in (self.rows or {}).values() for spot in row if spot is not None)

    @property
    def total(self) -> int:
        return self.inside + sum(spot.count for spot in self.outside)


def heat_map(folder: Path, label: str, about: str, log: Sequence[Mapping[str, Any]]) -> HeatMap:
    """The map of the delta in a run's folder; `log`: its history, by which a rank becomes a step."""
    path = folder / DELTA_FILE
    if not path.is_file():
        return HeatMap(label, about, why=f"There is no {DELTA_FILE} in this run's folder.")
    if path.stat().st_size > LARGEST:
        return HeatMap(label, about, why=f"Its delta has {path.stat().st_size:,} bytes, and is not read for a map.")

    try:
        delta = load(path)
    except SelectuneError as error:
        return HeatMap(label, about, why=f"Its delta cannot be read: {error}.")
    spots = [Spot(p.name, p.indices.numel(), p.numel, False, *_first(p.order, log)) for p in delta.patches]
    spots += [Spot(d.name, d.tensor.numel(), d.tensor.numel(), True) for d in delta.dense if d.kind == "parameter"]
    if not any(not spot.whole for spot in spots):
        return HeatMap(label, about, why=f"It trains {len(spots):,} tensors whole, so there is nothing to choose.")
    return _arranged(label, about, spots)


def _first(order: Any, log: Sequence[Mapping[str, Any]]) -> tuple[int | None, int | None]:
    """The lowest rank of a tensor, and the first step after which more scalars than that were selected."""
    if order is None or not order.numel():
        return None, None
    rank = int(order.min())
    after = (int(entry["step"]) for entry in log if (number(entry, "selected") or 0) > rank)
    return rank, next(after, None)


def place(name: str) -> tuple[str, int, str] | None:
    """(stack, layer, kind) of a tensor, by the first number in its name; None if there is none.

    >>> place("bert.encoder.layer.3.output.dense.weight"), place("classifier.bias")
    (('bert.encoder.layer', 3, 'output.dense.weight'), None)
    """
    hit = _LAYER.search(name)
    if hit is None:
        return None
    return name[: hit.start()], int(hit[1]), name[hit.end() :] or "itself"


def _arranged(label: str, about: str, spots: Sequence[Spot]) -> HeatMap:
    placed = [(found, spot) for spot in spots if (found := place(spot.name)) is not None]
    stacks = list(dict.fromkeys(stack for (stack, _, _), _ in placed))
    columns = sorted({(stacks.index(stack), layer) for (stack, layer, _), _ in placed})
    at = {(stacks.index(stack), layer, kind): spot for (stack, layer, kind), spot in placed}
    orders = [[kind for s, layer, kind in at if (s, layer) == column] for column in columns]
    names = [f"{_short(stacks, s)}{layer}" for s, layer in columns]
    rows = {kind: tuple(at.get((s, layer, kind)) for s, layer in columns) for kind in _merged(orders)}
    outside = tuple(spot for spot in spots if place(spot.name) is None)
    return HeatMap(label, about, tuple(names), rows, outside, any(spot.first is not None for spot in spots))


def _short(stacks: Sequence[str], at: int) -> str:
    return "" if len(stacks) == 1 else f"{stacks[at].rpartition('.')[0].rpartition('.')[2] or stacks[at]} "


def _merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """One order of all names that keeps to that of each list, the longest first.

    >>> _merged([["a", "d"], ["a", "b", "d"], ["c", "d"]])
    ['a', 'b', 'c', 'd']
    """
    merged: list[str] = []
    for order in sorted(orders, key=len, reverse=True):
        for i, name in enumerate(order):
            if name not in merged:
                behind = next((merged.index(later) for later in order[i:] if later in merged), len(merged))
                merged.insert(behind, name)
    return merged
