"""Arithmetic on deltas of one base: sum, scale, negate, intersect, TIES and DARE merges, overlap.

A delta holds replacement values. These functions add and scale its differences from the base, value - base, in float64,
and round base + sum once to the weight's dtype, to nearest, ties to even. A scalar that only one delta changes, with
factor 1, keeps that delta's bits; a scalar that no delta changes keeps the base's. The base's values come from `base`,
the base model, or from the deltas themselves (`old_values=True`); if all deltas carry them, so does the result. The
result is an ordinary delta whose `info["method"]` names its parents.

Offsets beside quantised weights are added and scaled as such, and the result lies beside the same weights. Tensors that
are recorded whole take part entry by entry, and so do buffers and zeroed patches. Integer tensors are rounded to
nearest. Booleans and complex numbers can only be copied from one delta, not computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selectune.bits import dtype_name, int_view, round_once
from selectune.delta.combine.aligned import Rows, align, as_deltas, base_of, check_finite_base, part_of
from selectune.delta.combine.overlap import Conflicts, Overlap, conflicts, count_conflicts, overlap
from selectune.delta.delta import Delta
from selectune.delta.file.parts import Dense, Part, Patch
from selectune.errors import ConfigError, DeltaError

__all__ = ["Conflicts", "Overlap", "add", "conflicts", "cut", "dare", "intersect", "negate", "overlap", "scale", "ties"]

_AGREED = ("task", "rows", "max_length", "architecture", "num_labels")
_EXACT = 2.0**53


def add(deltas: Sequence[Delta], *, weights: Sequence[float] | None = None, base: nn.Module | None = None) -> Delta:
    """The sum of several deltas: base + w_1 d_1 + w_2 d_2 + ..., all weights 1 unless given.

    The sum of deltas that do not overlap has the same bits as applying one after another. It takes float64 memory for
    one tensor's scalars at a time. Raises BaseMismatchError for deltas of different bases, DeltaError if the base's
    values are unknown, NonFiniteError if a sum leaves the dtype's range, ConfigError for weights that do not fit.

    Source: Ansell et al. 2022, arXiv 2110.07560, section 3.2; Ilharco et al. 2023, arXiv 2212.04089, section 2.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> deltas = [_example(model, 0, 1.0), _example(model, 1, 2.0)]
    >>> add(deltas, base=model).values["weight"].tolist()
    [1.0, 2.0]
    """
    deltas = as_deltas(deltas)
    factors = _weights(weights, len(deltas))
    return _summed("add", deltas, factors, {"weights": factors}, base)


def scale(delta: Delta, factor: float, *, base: nn.Module | None = None) -> Delta:
    """A delta made stronger or weaker: base + factor d. It writes where the delta does.

    Raises as `add` does. Source: Ilharco et al. 2023, arXiv 2212.04089, section 2 (the scaling term lambda).

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.fill_(1.0)
    >>> scale(_example(model, 0, 3.0), 0.5, base=model).values["weight"].tolist()
    [2.0]
    """
    deltas = as_deltas(delta)
    factor = _number("factor", factor)
    return _summed("scale", deltas, [factor], {"factor": factor}, base)


def negate(delta: Delta, *, base: nn.Module | None = None) -> Delta:
    """The delta in the opposite direction: base - d.

    Raises as `add` does. Source: Ilharco et al. 2023, arXiv 2212.04089, section 2 (forgetting by negation).

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.fill_(1.0)
    >>> negate(_example(model, 0, 3.0), base=model).values["weight"].tolist()
    [-1.0]
    """
    return _summed("negate", as_deltas(delta), [-1.0], {}, base)


def intersect(delta: Delta, other: Delta, *, base: nn.Module | None = None) -> Delta:
    """`delta`, restricted to the places that `other` writes too: the values are `delta`'s, bit for bit.

    Raises BaseMismatchError for deltas of different bases, DeltaError if the base's values are unknown.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> both = add([_example(model, 0, 1.0), _example(model, 1, 2.0)], base=model)
    >>> intersect(both, _example(model, 1, 5.0), base=model).values["weight"].tolist()
    [2.0]
    """
    deltas = as_deltas([delta, other])
    parts: list[Part] = []
    for rows in align(deltas, base):
        if None in rows.at:
            continue
        kept = rows.written.all(0)
        if rows.whole and not bool(kept.all()):  # whole in one delta, scattered in the other
            rows = dataclasses.replace(rows, whole=False)
        parts.append(part_of(rows, kept, rows.new[0]))
    return _made("intersect", deltas, parts, {})


def cut(delta: Delta, budget: int, *, base: nn.Module | None = None) -> Delta:
    """The first `budget` scalars that a run selected, of a delta with the order of selection; whole tensors stay.

    The support is the run's own as it had that many scalars, if selection only ever added some. Where the delta only
    says which step selected a scalar, those of one step go by their place. The values are those of the end of the run:
    they were trained beside the scalars that are left out.

    Raises ConfigError for a delta without the order and a budget outside 1 to its scalars, and as `intersect` does.
    Source: Agarwal et al. 2025, arXiv 2408.14470 (one run gives models of several budgets).

    >>> import selectune as st
    >>> model = torch.nn.Linear(8, 4)
    >>> tuner = st.attach(model, st.id3(budget=6, steps=2))
    >>> optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    >>> for _ in range(2):
    ...     _ = model(torch.ones(1, 8)).square().sum().backward() or optimizer.step()
    ...     optimizer.zero_grad()
    >>> delta = tuner.delta()
    >>> tuner.detach()
    >>> cut(delta, 3, base=model).selected
    3
    """
    if delta.patches and delta.patches[0].order is None:
        raise ConfigError(
            f"{delta.label} does not say in which order its scalars were selected. It was saved with order=False, by "
            "an older selectune, or by a method that selects only once or also drops scalars."
        )
    if type(budget) is not int or not 1 <= budget <= delta.selected:
        raise ConfigError(f"budget={budget!r}: must be a count of 1 to {delta.selected:,}, the delta's scalars.")
    ranks = {patch.name: patch.order for patch in delta.patches if patch.order is not None}
    together = torch.cat(list(ranks.values()))
    first = torch.zeros(together.numel(), dtype=torch.bool)
    first[torch.sort(together, stable=True).indices[:budget]] = True
    mine = dict(zip(ranks, first.split([rank.numel() for rank in ranks.values()]), strict=True))
    parts: list[Part] = []
    for rows in align([delta], base):
        kept = None if rows.whole else mine.get(rows.name)
        if kept is None or bool(kept.any()):
            parts.append(part_of(rows, kept, rows.new[0]))
    return _made("cut", [delta], parts, {}, budget=budget)


def ties(
    deltas: Sequence[Delta],
    *,
    density: float,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    base: nn.Module | None = None,
) -> Delta:
    """TIES merge: trim small differences, elect a sign for each scalar, average the differences that have it.

        trim      each delta keeps the round(density n) largest |d| of its n scalars; ties go to the first
        elect     s = sign(w_1 d_1 + w_2 d_2 + ...)
        merge     base + scale (sum of w_i d_i with sign s) / (sum of their w_i)

    `weights` are positive, 1 unless given. A scalar whose trimmed differences sum to 0 keeps the base's value. The
    result holds the scalars that got a value. Buffers are not part of the task vector; they are averaged over the
    deltas that change them. The paper keeps 20 % of all weights. Sparse deltas hold far fewer, so `density` is a share
    of the delta's scalars. It takes float64 memory for all scalars. Raises as `add` does, and ConfigError for a
    density outside (0, 1].

    Source: Yadav et al. 2023, arXiv 2306.01708, algorithm 1; the weights are ours.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.fill_(1.0)
    >>> deltas = [_example(model, 0, 3.0), _example(model, 0, 5.0), _example(model, 0, -1.0)]
    >>> ties(deltas, density=1.0, base=model).values["weight"].tolist()
    [4.0]
    """
    deltas = as_deltas(deltas)
    factors, strength = _weights(weights, len(deltas)), _number("scale", scale)
    if min(factors) <= 0:
        raise ConfigError(f"weights of a TIES merge must be above 0, they weigh votes; got {factors}.")
    if not 0 < _number("density", density) <= 1:
        raise ConfigError(f"density is the share of each delta's scalars that stays, in (0, 1]; got {density}.")
    aligned = align(deltas, base)
    stays = _trimmed(deltas, aligned, density)
    parts: list[Part] = []
    for rows in aligned:
        moved, buffer = rows.changed & _kept(rows, stays), rows.kind == "buffer"
        voted = _column(factors) * torch.where(moved, rows.differences, 0.0)
        agree = moved if buffer else moved & (voted.sign() == _in_turn(voted).sign()) & (voted != 0)
        votes = _in_turn(_column(factors) * agree).clamp_min(min(factors))
        total = strength * (_in_turn(torch.where(agree, voted, 0.0)) / votes)
        parts.append(part_of(rows, agree.any(0), _settled(rows, agree, total, agree & (strength == 1.0))))
    return _made("ties", deltas, parts, {"density": density, "weights": factors, "scale": strength}, aligned)


def dare(
    deltas: Sequence[Delta],
    *,
    drop: float,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    base: nn.Module | None = None,
) -> Delta:
    """DARE merge: drop each difference with probability `drop`, scale the rest by 1 / (1 - drop), then add.

        base + sum_i w_i m_i d_i / (1 - drop),   m_i = 1 with probability 1 - drop, so the mean is that of `add`

    One generator, seeded with `seed`, draws one float64 for each scalar of each delta, delta after delta, tensor after
    tensor, patches before dense tensors; a scalar stays if its number is at least `drop`. The result holds the scalars
    that stay. Buffers are added without dropping. For DARE before another merge, call it with each delta alone and its
    own seed. Raises as `add` does, and ConfigError for a drop outside [0, 1).

    Source: Yu et al. 2024, arXiv 2311.03099, section 3.2 (drop and rescale), 3.3 (merging).

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.fill_(1.0)
    >>> dare([_example(model, 0, 3.0)], drop=0.5, seed=2, base=model).values["weight"].tolist()
    [5.0]
    """
    deltas = as_deltas(deltas)
    factors = _weights(weights, len(deltas))
    if not 0 <= _number("drop", drop) < 1:
        raise ConfigError(f"drop is the probability that a difference is dropped, in [0, 1); got {drop}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be an integer from 0 to 2^63 - 1; got {seed!r}.")
    aligned = align(deltas, base)
    stays = _drawn(deltas, drop, seed)
    parts: list[Part] = []
    for rows in aligned:
        kept = _kept(rows, stays)
        column = _column(factors if rows.kind == "buffer" else [weight / (1 - drop) for weight in factors])
        parts.append(part_of(rows, kept.any(0), _sum(rows, column, rows.changed & kept)))
    return _made("dare", deltas, parts, {"drop": drop, "seed": seed, "weights": factors}, aligned)


# --- the arithmetic -----------------------------------------------------------------------------------------


def _summed(
    name: str, deltas: list[Delta], factors: list[float], parameters: dict[str, Any], base: nn.Module | None
) -> Delta:
    aligned, column = align(deltas, base), _column(factors)
    parts = [part_of(rows, None, _sum(rows, column, rows.changed)) for rows in aligned]
    if len(deltas) > 1:
        return _made(name, deltas, parts, parameters, aligned)
    return _made(name, deltas, parts, parameters, budget=deltas[0].info["budget"])


def _column(factors: Sequence[float]) -> Tensor:
    return torch.tensor(factors, dtype=torch.float64)[:, None]


def _sum(rows: Rows, column: Tensor, moved: Tensor) -> Tensor:
    """base + the sum of factors `column` (k, 1) times differences (k, n) where they are `moved` (k, n)."""
    total = _in_turn(column * torch.where(moved, rows.differences, 0.0))
    return _settled(rows, moved & (column != 0), total, moved & (column == 1))


def _in_turn(terms: Tensor) -> Tensor:
    """The sum of the rows of (k, n), first to last; torch's own sum promises no order."""
    total = torch.zeros_like(terms[0])
    for row in terms:
        total += row
    return total


def _settled(rows: Rows, moved: Tensor, total: Tensor, exact: Tensor) -> Tensor:
    """base + total (n,), rounded once; an entry that only one delta moves (k, n), and exactly so, keeps its bits."""
    alone = (moved.sum(0) == 1) & exact.any(0)
    computed = moved.any(0) & ~alone
    check_finite_base(rows, computed)
    base, source = int_view(rows.base), exact.int().argmax(0, keepdim=True)
    taken = torch.where(alone, int_view(rows.new).gather(0, source)[0], base)
    if not bool(computed.any()):
        return taken.view(rows.dtype)
    if rows.dtype.is_floating_point:
        made = round_once(rows.base.double() + total, rows.dtype)
    else:
        made = _whole_numbers(rows, total, computed)
    return torch.where(computed & (total != 0), int_view(made), taken).view(rows.dtype)


def _whole_numbers(rows: Rows, total: Tensor, where: Tensor) -> Tensor:
    if rows.dtype == torch.bool or rows.dtype.is_complex:
        raise DeltaError(
            f'"{rows.name}" has dtype {dtype_name(rows.dtype)} and would have to be added or scaled; such tensors can '
            f"only be taken over from the one delta that changes them"
        )
    limits = torch.iinfo(rows.dtype)
    found = (rows.base.double() + total).round()
    bad = where & ((found < max(limits.min, -_EXACT)) | (found > min(limits.max, _EXACT)))
    if bool(bad.any()):
        at = int(bad.int().argmax())
        raise DeltaError(
            f'entry {int(rows.indices[at])} of "{rows.name}" comes to {found[at].item():.0f}, beyond what '
            f"{dtype_name(rows.dtype)} or float64 holds exactly"
        )
    return torch.where(where, found, 0.0).to(rows.dtype)


def _kept(rows: Rows, stays: Sequence[dict[str, Tensor]]) -> Tensor:
    """(k, n): the places of each delta's entries that stay; a buffer's all do."""
    if rows.kind == "buffer":
        return rows.written
    found = torch.zeros(rows.new.shape, dtype=torch.bool)
    for row, at, own in zip(found, rows.at, stays, strict=True):
        if at is not None:
            row[at] = own[rows.name]
    return found


def _trimmed(deltas: list[Delta], aligned: list[Rows], density: float) -> list[dict[str, Tensor]]:
    """For each delta and tensor: whether an entry is among the delta's round(density n) largest differences."""
    magnitudes: list[dict[str, Tensor]] = [{} for _ in deltas]
    for rows in aligned:
        check_finite_base(rows, rows.changed.any(0))
        for own, at, change in zip(magnitudes, rows.at, rows.differences, strict=True):
            if at is not None:
                own[rows.name] = change[at].abs()
    found = []
    for delta, own in zip(deltas, magnitudes, strict=True):
        names = [part.name for part in _parameters(delta)]
        every = torch.cat([own[name] for name in names]) if names else torch.zeros(0)
        stays = torch.zeros(every.numel(), dtype=torch.bool)
        count = max(1, round(density * every.numel()))
        stays[every.sort(descending=True, stable=True).indices[:count]] = True
        found.append(dict(zip(names, stays.split([own[name].numel() for name in names]), strict=True)))
    return found


def _drawn(deltas: list[Delta], drop: float, seed: int) -> list[dict[str, Tensor]]:
    """For each delta and tensor: whether an entry stays."""
    generator = torch.Generator().manual_seed(seed)

    def stays(part: Part) -> Tensor:
        return torch.rand(part.new.numel(), generator=generator, dtype=torch.float64) >= drop

    return [{part.name: stays(part) for part in _parameters(delta)} for delta in deltas]


def _parameters(delta: Delta) -> list[Part]:
    return [part for part in delta.parts if part.kind == "parameter"]


# --- the result ---------------------------------------------------------------------------------------------


def _made(
    name: str,
    deltas: list[Delta],
    parts: Sequence[Part],
    parameters: dict[str, Any],
    merged: Sequence[Rows] | None = None,
    budget: int | None = None,
) -> Delta:
    """The result of an operation; a merge of several deltas records their conflicts too."""
    methods = [delta.info["method"] for delta in deltas]
    agreed = {key: value for key, value in methods[0].items() if all(m.get(key) == value for m in methods)}
    parents = [
        {"digest": delta.digest, "name": method.get("name", "delta"), "selected": delta.selected}
        for delta, method in zip(deltas, methods, strict=True)
    ]
    described = {"name": name, **parameters, "parents": parents, **{k: agreed[k] for k in _AGREED if k in agreed}}
    if merged is not None:
        described["conflicts"] = count_conflicts(merged).totals
    first = deltas[0].info
    info = {"method": described, "budget": budget, "base": base_of(deltas)}
    info |= {key: first[key] for key in ("module", "model") if key in first}
    patches = [part for part in parts if isinstance(part, Patch)]
    return Delta(patches, [part for part in parts if isinstance(part, Dense)], info)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    found = [_number("a weight", weight) for weight in weights]
    if len(found) != count:
        raise ConfigError(f"weights must have a number for each delta: {count}; got {len(found)}.")
    return found


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{what} must be a finite number; got {value!r}.")
    return float(value)


def _example(model: nn.Linear, at: int, value: float) -> Delta:
    """A delta of one scalar, for the examples above."""
    from selectune.delta.file.model_info import base_info

    old = model.weight.detach().reshape(-1)[at : at + 1]
    patch = Patch.make("weight", tuple(model.weight.shape), torch.tensor([at]), torch.tensor([value]), old)
    return Delta([patch], [], {"base": base_info(model)})
