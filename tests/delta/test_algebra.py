"""Arithmetic on deltas against hand-computed numbers and against the slow truth of algebra_kit."""

from __future__ import annotations

import copy
import math

import hypothesis
import pytest
import torch
from algebra_kit import dense_values, families, flat, rounded, settle, table, values_of
from delta_kit import Bag, make_delta, random_bits, snapshot, subset
from hypothesis import strategies as st

from selectune.bits import round_once
from selectune.delta import Delta
from selectune.delta.combine import algebra

NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
weights_for = st.lists(st.sampled_from([-1.5, -1.0, 0.0, 0.3, 1.0, 2.0]), min_size=4, max_size=4)


def vector(model: Bag, **at: float) -> Delta:
    """A delta on the vector "w": x3=5.0 writes 5.0 at 3."""
    where = sorted(int(key[1:]) for key in at)
    values = torch.tensor([at[f"x{i}"] for i in where])
    return make_delta(model, {"w": torch.tensor(where)}, {"w": values}, old_values=True)


def ones(n: int = 4) -> Bag:
    return Bag({"w": torch.ones(n)})


def on(model: Bag, delta: Delta) -> list[float]:
    with delta.applied(model):
        return flat(model.w)


# --- rounding


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_one_rounding_is_to_the_nearest(dtype):
    """Also at the ties and just beside them, where a way through float32 rounds twice."""
    values, _ = table(dtype)
    some = values[:: max(1, len(values) // 400)] + values[:2]
    points = []
    for low in some:
        at = values.index(low)
        if at + 1 < len(values):
            middle = (low + values[at + 1]) / 2
            points += [low, middle, math.nextafter(middle, math.inf), math.nextafter(middle, -math.inf)]
    found = round_once(torch.tensor(points, dtype=torch.float64), dtype)
    assert flat(found) == [rounded(point, dtype) for point in points]


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64], ids=str)
def test_values_of_the_dtype_come_through(dtype):
    own = random_bits((512,), dtype, 3).double()
    own = own[torch.isfinite(own)]
    assert torch.equal(round_once(own, dtype).double(), own)


# --- by hand


def test_add_by_hand():
    model = ones()
    both = algebra.add([vector(model, x0=3.0, x1=2.0), vector(model, x1=0.5, x3=7.0)])
    assert both.support["w"].tolist() == [0, 1, 3]
    assert on(model, both) == [3.0, 1.5, 1.0, 7.0]
    weighted = algebra.add([vector(model, x0=3.0), vector(model, x0=2.0)], weights=[0.5, -2.0])
    assert on(model, weighted) == [0.0, 1.0, 1.0, 1.0]


def test_scale_negate_intersect_by_hand():
    model = ones()
    delta = vector(model, x0=3.0, x1=0.0)
    assert on(model, algebra.scale(delta, 0.25)) == [1.5, 0.75, 1.0, 1.0]
    assert on(model, algebra.negate(delta)) == [-1.0, 2.0, 1.0, 1.0]
    shared = algebra.intersect(delta, vector(model, x1=9.0, x2=9.0))
    assert shared.support["w"].tolist() == [1]
    assert on(model, shared) == [1.0, 0.0, 1.0, 1.0]


def test_ties_by_hand():
    """Differences over a base of ones; density 3/4 keeps three of four in each delta.

    d1 = [4, -2, 1, 3]    trimmed [4, -2, 0, 3]      sum [2, -6, 0.5, 4]
    d2 = [-2, -4, 0.5, 1] trimmed [-2, -4, 0, 1]  -> trimmed sums [2, -6, 0, 4], signs [+, -, none, +]
    means of those who agree: [4, -3, 0, 2]
    """
    model = ones()
    deltas = [vector(model, x0=5.0, x1=-1.0, x2=2.0, x3=4.0), vector(model, x0=-1.0, x1=-3.0, x2=1.5, x3=2.0)]
    merged = algebra.ties(deltas, density=0.75)
    assert merged.support["w"].tolist() == [0, 1, 3]
    assert on(model, merged) == [5.0, -2.0, 1.0, 3.0]
    assert on(model, algebra.ties(deltas, density=0.75, scale=0.5)) == [3.0, -0.5, 1.0, 2.0]
    # weights 1 and 4: sums [4-8, -2-16, 0, 3+4], so x0 goes down with d2 alone; x1 (-2-16)/5, x3 (3+4)/5
    heavy = algebra.ties(deltas, density=0.75, weights=[1.0, 4.0])
    assert on(model, heavy) == [-1.0, pytest.approx(1 - 3.6), 1.0, pytest.approx(2.4)]
    assert merged.info["method"]["conflicts"] == {"written": 4, "shared": 4, "opposed": 1}


def test_ties_trims_exactly_its_count_and_equal_magnitudes_in_order():
    model = ones(6)
    one = vector(model, x0=2.0, x1=0.0, x2=2.0, x3=0.0, x4=2.0, x5=0.0)
    assert algebra.ties([one], density=0.5).support["w"].tolist() == [0, 1, 2]


def test_ties_at_the_cut_go_to_the_first_among_larger_ones_too():
    """An unstable sort shuffles equal magnitudes that have larger ones between them."""
    model = ones(60)
    large, small = range(0, 60, 3), [i for i in range(60) if i % 3]
    one = vector(model, **{f"x{i}": 3.0 if i % 3 == 0 else (i % 2) * 2.0 for i in range(60)})
    assert algebra.ties([one], density=0.5).support["w"].tolist() == sorted([*large, *small[:10]])


def test_opposed_equal_differences_cancel_to_the_base():
    model = ones()
    deltas = [vector(model, x0=3.0), vector(model, x0=-1.0)]
    assert algebra.ties(deltas, density=1.0).selected == 0
    assert on(model, algebra.add(deltas)) == [1.0, 1.0, 1.0, 1.0]


def test_dare_by_hand():
    """The documented stream, computed by hand, decides what is dropped. At drop=0.5 the rest is doubled."""
    model = ones()
    deltas = [vector(model, x0=2.0, x1=3.0, x2=0.5), vector(model, x1=-1.0, x3=5.0)]
    generator = torch.Generator().manual_seed(21)
    first = (torch.rand(3, generator=generator, dtype=torch.float64) >= 0.5).tolist()
    second = (torch.rand(2, generator=generator, dtype=torch.float64) >= 0.5).tolist()
    assert (first, second) == ([True, False, True], [False, True])
    merged = algebra.dare(deltas, drop=0.5, seed=21)
    assert merged.support["w"].tolist() == [0, 2, 3]
    assert on(model, merged) == [3.0, 1.0, 0.0, 9.0]


def test_dare_keeps_the_mean():
    model = Bag({"w": torch.zeros(2000)})
    delta = make_delta(model, {"w": torch.arange(2000)}, {"w": torch.ones(2000)}, old_values=True)
    kept = algebra.dare([delta], drop=0.9, seed=1)
    assert set(kept.values["w"].tolist()) == {10.0}
    assert abs(kept.selected - 200) < 60  # 4.5 standard deviations


def test_dare_that_drops_nothing_is_the_sum():
    model = ones()
    deltas = [vector(model, x0=2.0, x1=3.0), vector(model, x1=-1.0, x3=5.0)]
    assert algebra.dare(deltas, drop=0.0).digest == algebra.add(deltas).digest


def test_conflicts_and_overlap_by_hand():
    model = Bag({"w": torch.ones(4), "v": torch.ones(3)})

    def of(w: dict[int, float], v: dict[int, float]) -> Delta:
        parts = {"w": w, "v": v}
        return make_delta(
            model,
            {name: torch.tensor(sorted(part), dtype=torch.int64) for name, part in parts.items()},
            {name: torch.tensor([part[i] for i in sorted(part)]) for name, part in parts.items()},
            old_values=True,
        )

    one, two = of({0: 2.0, 1: 2.0, 2: 0.0}, {0: 3.0}), of({1: 0.0, 2: -1.0}, {1: 3.0})
    found = algebra.conflicts([one, two])
    assert found.totals == {"written": 5, "shared": 2, "opposed": 1}
    assert {name: row.totals for name, row in found.tensors.items()} == {"w": {"written": 3, "shared": 2, "opposed": 1}}
    both = algebra.overlap(one, two)
    assert (both.first, both.second, both.shared) == (4, 3, 2)
    assert (both.ratio, both.jaccard) == (0.5, 0.4)
    assert (both.tensors["w"].ratio, both.tensors["v"].shared) == (2 / 3, 0)


# --- against the slow truth


def truth_of_a_sum(model, deltas, factors):
    base, dtype = values_of(model), next(model.parameters()).dtype
    rows = [dense_values(delta, model) for delta in deltas]
    return {
        name: [
            settle(
                old,
                [
                    (f, row[name][i])
                    for f, row in zip(factors, rows, strict=True)
                    if f and row[name][i] not in (None, old)
                ],
                1.0,
                dtype,
            )
            for i, old in enumerate(column)
        ]
        for name, column in base.items()
    }


@hypothesis.given(families(), weights_for)
def test_sums(family, factors):
    model, deltas = family
    base, factors = snapshot(model), factors[: len(deltas)]
    truth = truth_of_a_sum(model, deltas, factors)
    hypothesis.assume(all(math.isfinite(v) for column in truth.values() for v in column))
    merged = algebra.add(deltas, weights=factors)
    with merged.applied(model):
        assert values_of(model) == truth
    assert snapshot(model) == base
    assert merged == Delta.from_bytes(merged.to_bytes())
    bare = algebra.add([without_old(delta, model) for delta in deltas], weights=factors, base=model)
    assert not bare.reversible
    with bare.applied(model):
        assert values_of(model) == truth


def without_old(delta, model):
    return make_delta(model, delta.support, delta.values, dense={entry.name: entry.tensor for entry in delta.dense})


@hypothesis.given(families(), st.sampled_from([0.2, 0.5, 1.0]), st.booleans(), st.sampled_from([1.0, 0.5]))
def test_ties(family, density, weighted, strength):
    model, deltas = family
    base, dtype = values_of(model), next(model.parameters()).dtype
    factors = [1.0, 2.0, 0.5, 1.0][: len(deltas)] if weighted else [1.0] * len(deltas)
    rows = [dense_values(delta, model) for delta in deltas]
    for delta, row in zip(deltas, rows, strict=True):
        names = [part.name for part in [*delta.patches, *delta.dense]]
        own = [(name, i) for name in names for i, new in enumerate(row[name]) if new is not None]
        own.sort(key=lambda key, row=row: -abs(row[key[0]][key[1]] - base[key[0]][key[1]]))  # stable: ties in order
        for name, i in own[max(1, round(density * len(own))) :]:
            row[name][i] = None
    truth = {}
    for name, column in base.items():
        truth[name] = []
        for i, old in enumerate(column):
            moves = [(f, row[name][i]) for f, row in zip(factors, rows, strict=True) if row[name][i] not in (None, old)]
            total = 0.0
            for f, new in moves:
                total += f * (new - old)
            agree = [(f, new) for f, new in moves if f * (new - old) * total > 0]
            if len(agree) == 1 and strength == 1.0:
                truth[name].append(agree[0][1])
                continue
            mass, pull = 0.0, 0.0
            for f, new in agree:
                mass, pull = mass + f, pull + f * (new - old)
            truth[name].append(rounded(old + strength * (pull / mass), dtype) if agree else old)
    merged = algebra.ties(deltas, density=density, weights=factors, scale=strength)
    with merged.applied(model):
        assert values_of(model) == truth


@hypothesis.given(families(), st.sampled_from([0.0, 0.5, 0.9]), st.integers(0, 50))
def test_dare(family, drop, seed):
    model, deltas = family
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas:
        row = dense_values(delta, model)
        for part in [*delta.patches, *delta.dense]:
            places = [i for i, new in enumerate(row[part.name]) if new is not None]
            for i, draw in zip(places, torch.rand(len(places), generator=generator, dtype=torch.float64), strict=True):
                if draw < drop:
                    row[part.name][i] = None
        rows.append(row)
    factor, dtype = 1.0 / (1 - drop), next(model.parameters()).dtype
    truth = {
        name: [
            settle(old, [(factor, row[name][i]) for row in rows if row[name][i] not in (None, old)], 1.0, dtype)
            for i, old in enumerate(column)
        ]
        for name, column in values_of(model).items()
    }
    hypothesis.assume(all(math.isfinite(v) for column in truth.values() for v in column))
    with algebra.dare(deltas, drop=drop, seed=seed).applied(model):
        assert values_of(model) == truth


@hypothesis.given(families())
def test_overlap_and_intersection(family):
    model, deltas = family
    one, two = deltas[0], deltas[-1]
    rows = [dense_values(delta, model) for delta in (one, two)]
    sets = [{(n, i) for n, column in row.items() for i, v in enumerate(column) if v is not None} for row in rows]
    found = algebra.overlap(one, two)
    assert (found.first, found.second, found.shared) == (len(sets[0]), len(sets[1]), len(sets[0] & sets[1]))
    assert found.jaccard == (len(sets[0] & sets[1]) / len(sets[0] | sets[1]) if sets[0] | sets[1] else 0)
    shared = dense_values(algebra.intersect(one, two), model)
    for name, column in shared.items():
        assert column == [v if (name, i) in sets[1] else None for i, v in enumerate(rows[0][name])]


@hypothesis.given(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]), st.integers(0, 500))
def test_deltas_apart_sum_to_one_after_the_other(dtype, seed):
    """Exact to the bit for every base: NaN payloads, infinities, zeros of both signs."""
    model = Bag({"w": random_bits((6, 7), dtype, seed), "v": random_bits((11,), dtype, seed + 1)})
    places = subset(42, 20, seed)
    halves = [places[:9].sort().values, places[9:].sort().values]
    values = [random_bits((11,), torch.bfloat16, seed + 3)[: len(half)].nan_to_num(1.0, 2.0, -0.0) for half in halves]
    deltas = [
        make_delta(model, {"w": half}, {"w": v.clamp(-200, 200).to(dtype)})
        for half, v in zip(halves, values, strict=True)
    ]
    both = algebra.add(deltas, base=model)
    turn, base = copy.deepcopy(model), snapshot(model)
    deltas[0].apply(turn)
    deltas[1].apply(turn, stack=True)
    both.apply(model)
    assert snapshot(model) == snapshot(turn)
    both.revert(model)
    assert snapshot(model) == base
    assert both.verify(model).ok
