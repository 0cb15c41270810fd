"""Selection against a sort of everything: exact counts and ties, whatever the pieces and their order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

import selectune as st
from selectune import select
from selectune.select import GlobalTopK, PerTensor


def best(scores: list[np.ndarray], quota: int) -> set[tuple[int, int]]:
    """The slow obvious truth: one list, sorted by (score descending, tensor, flat index)."""
    entries = [(-s, t, i) for t, column in enumerate(scores) for i, s in enumerate(column) if s > -np.inf]
    return {(t, i) for _, t, i in sorted(entries)[:quota]}


def chosen(collector) -> list[tuple[int, int]]:
    tensors, flat, _ = collector.close()
    return list(zip(tensors.tolist(), flat.tolist(), strict=True))


@some.composite
def cases(draw):
    few = some.sampled_from([0.0, 1.0, 2.0, -1.0, -np.inf, 0.5])  # few distinct scores: ties everywhere
    scores = draw(some.lists(some.lists(few, max_size=12).map(np.array), min_size=1, max_size=5))
    return scores, draw(some.integers(0, 40)), draw(some.integers(1, 5)), draw(some.randoms(use_true_random=False))


@given(cases())
def test_exactly_the_best_in_any_pieces_and_any_order(case):
    scores, quota, piece, rng = case
    collector = GlobalTopK().collector(quota, [len(s) for s in scores], seed=0)
    offers = [(t, start) for t, s in enumerate(scores) for start in range(0, len(s), piece)]
    rng.shuffle(offers)
    for t, start in offers:
        collector.offer(t, start, torch.tensor(scores[t][start : start + piece], dtype=torch.float32))
    got = chosen(collector)
    assert len(got) == len(set(got))
    assert set(got) == best(scores, quota)


@given(cases(), some.sampled_from([torch.float32, torch.float64]), some.booleans(), some.sampled_from([0, 1, 3]))
def test_what_is_queued_is_chosen_as_what_is_offered(case, dtype, listed, slack):
    scores, quota, piece, rng = case
    before, select._SLACK = select._SLACK, slack
    try:
        for rule in (GlobalTopK(), GlobalTopK(tie="random"), PerTensor()):
            offered, queued = (rule.collector(quota, [len(s) for s in scores], seed=3) for _ in range(2))
            offers = [(t, start) for t, s in enumerate(scores) for start in range(0, len(s), piece)]
            rng.shuffle(offers)
            for t, start in offers:
                part = torch.tensor(scores[t][start : start + piece], dtype=dtype)
                flat = torch.arange(start, start + len(part)) if listed else start
                offered.offer(t, flat, part, part + 1)
                queued.queue(t, flat, part, part + 1)
            for mine, theirs in zip(queued.close(), offered.close(), strict=True):
                assert torch.equal(mine, theirs.to(mine))
    finally:
        select._SLACK = before


def test_keys_of_floats_order_as_the_floats_do():
    numbers = [-np.inf, -3.5, -1e-40, -0.0, 0.0, 1e-45, 1e-40, 1.0, np.nextafter(np.float32(1), np.float32(2)), np.inf]
    scores = torch.tensor(np.array(numbers, dtype=np.float32))
    keys = select._keys(scores)
    assert keys.unique().numel() == len(numbers)
    assert torch.argsort(keys, descending=True).tolist() == torch.sort(scores, descending=True, stable=True)[1].tolist()
    below, above = select._keys(torch.tensor([-0.0, 0.0, -0.0]))[:2]
    assert below > above  # equal scores: the earlier first


@given(cases(), some.sampled_from([0, 1, 3]))
def test_compressing_early_changes_nothing(case, slack):
    before, select._SLACK = select._SLACK, slack
    try:
        test_exactly_the_best_in_any_pieces_and_any_order.hypothesis.inner_test(case)
    finally:
        select._SLACK = before


def test_ties_go_to_the_earlier_tensor_and_the_lower_index():
    collector = GlobalTopK().collector(3, [2, 2], seed=0)
    collector.offer(1, 0, torch.ones(2))
    collector.offer(0, 0, torch.ones(2))
    assert chosen(collector) == [(0, 0), (0, 1), (1, 0)]


def test_a_smaller_entry_in_a_later_tensor_beats_a_tie_in_an_earlier_one():
    """The released toolkit's cutoff compare picks A0, A1 here and never B0 (methods: PaFi pitfalls)."""
    model = torch.nn.ParameterDict(
        {"A": torch.nn.Parameter(torch.full((3,), 0.2)), "B": torch.nn.Parameter(torch.tensor([0.1]))}
    )
    tuner = st.attach(model, st.pafi(2))
    assert {n: i.tolist() for n, i in tuner.support.items()} == {"A": [0], "B": [0]}


def test_random_ties_are_seeded_and_spread():
    def pick(seed):
        collector = GlobalTopK(tie="random").collector(1000, [1000, 3000], seed)
        for t, n in ((0, 1000), (1, 3000)):
            collector.offer(t, 0, torch.zeros(n))
        return chosen(collector)

    assert pick(1) == pick(1) != pick(2)
    share = sum(t == 0 for t, _ in pick(1)) / 1000
    assert 0.2 < share < 0.3  # a quarter of the entries, five standard deviations
    assert len(set(pick(1))) == 1000


def test_what_is_carried_along_stays_with_its_entry():
    collector = GlobalTopK().collector(2, [4], seed=0)
    collector.offer(0, 0, torch.tensor([1.0, 5.0, 3.0, 2.0]), torch.tensor([10.0, 50.0, 30.0, 20.0]))
    _, flat, carried = collector.close()
    assert (flat.tolist(), carried.tolist()) == ([1, 2], [50.0, 30.0])


def test_an_unknown_tie_rule():
    with pytest.raises(st.errors.ConfigError, match="Known: order, random"):
        GlobalTopK(tie="coin")


def test_random_selects_uniformly():
    """Chi-square over 100 tensors of 1,000, 20,000 chosen: expected 200 each."""
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(1000)) for _ in range(100))
    tuner = st.attach(model, st.random(20_000), seed=3)
    counts = [len(tuner.support[str(i)]) for i in range(100)]
    assert sum(counts) == 20_000
    assert sum((c - 200) ** 2 / (200 * 0.8) for c in counts) < 160  # 99 degrees: beyond 4 standard deviations


@given(some.integers(0, 500), some.lists(some.integers(0, 100), min_size=1, max_size=12))
def test_allocation_is_the_largest_remainder_and_exact(total, sizes):
    if total > sum(sizes):
        with pytest.raises(st.errors.BudgetError, match="cannot be divided"):
            PerTensor().allocate(total, sizes)
        return
    counts, whole = PerTensor().allocate(total, sizes), max(1, sum(sizes))
    assert sum(counts) == total
    shares = [Fraction(total * size, whole) for size in sizes]
    assert all(
        share - 1 < count < share + 1 and count <= size
        for share, count, size in zip(shares, counts, sizes, strict=True)
    )
    up = [(share % 1, -j) for j, (share, count) in enumerate(zip(shares, counts, strict=True)) if count > share]
    down = [(share % 1, -j) for j, (share, count) in enumerate(zip(shares, counts, strict=True)) if count <= share]
    assert not up or not down or min(up) > max(down)


@given(cases())
def test_the_best_of_every_tensor(case):
    scores, quota, piece, rng = case
    sizes = [len(s) for s in scores]
    quota = min(quota, sum(sizes))
    counts = PerTensor().allocate(quota, sizes)
    collector = PerTensor().collector(quota, sizes, seed=0)
    offers = [(t, start) for t, s in enumerate(scores) for start in range(0, len(s), piece)]
    rng.shuffle(offers)
    for t, start in offers:
        collector.offer(t, start, torch.from_numpy(scores[t][start : start + piece]))
    found = chosen(collector)
    expected = {(t, i) for t, column in enumerate(scores) for _, i in best([column], counts[t])}
    assert set(found) == expected
    assert len(found) == len(expected)
    keys = [(-scores[t][i], t, i) for t, i in found]
    assert keys == sorted(keys)


def test_increments_per_tensor_come_to_the_share_of_the_budget():
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 9), torch.nn.Linear(9, 3))
    tuner = st.attach(model, st.Method(score=st.scores.d3(), select=PerTensor(), schedule=st.schedule.Increment(50, 7)))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for t in range(7):
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert tuner.selected == (t + 1) * 50 // 7
    counts = {n: f.numel() for n, f in tuner.support.items()}
    sizes = {n: p.numel() for n, p in model.named_parameters() if "selectune" not in n}
    assert counts == dict(zip(sizes, PerTensor().allocate(50, list(sizes.values())), strict=True))
