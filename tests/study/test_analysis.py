"""Numbers of a selection: by hand, by brute force, and where nothing can be said."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st_
from torch import nn

import selectune as st
from selectune.delta import Delta, Dense, Patch, base_info
from selectune.errors import BaseMismatchError, ConfigError
from selectune.study.analysis.magnitudes import against_full, by_group, moved, spearman
from selectune.study.analysis.sharing import overlaps, shared
from selectune.study.analysis.spread import entropies, series, series_of, spread
from selectune.study.analysis.supports import Support, steps_of, support_of
from selectune.study.analysis.theorem import Model, check_theorem, heuristic
from selectune.study.analysis.timing import by_tensor, histogram, update_counts


def support(sizes, **chosen) -> Support:
    """Of tensors a, b, c, ...; `chosen`: {name: {flat index: step}}."""
    names = dict(zip("abcdefgh", sizes, strict=False))
    entries = {name: torch.tensor(sorted(of)) for name, of in chosen.items()}
    return Support(names, entries, {name: torch.tensor([of[i] for i in sorted(of)]) for name, of in chosen.items()})


def test_entropies_of_methods_md():
    found = entropies([0.5, 0.25, 0, 0.25])
    assert found.normalised == pytest.approx(1.0397, abs=5e-5)
    assert found.relative == pytest.approx(0.75, abs=1e-12)
    assert found.raw == pytest.approx(0.25993, abs=5e-6)
    assert found.bernoulli == pytest.approx(0.45445, abs=5e-6)  # methods.md prints .45435: (.69315 + 2 x .56234) / 4
    assert entropies([0.01] * 7).relative == pytest.approx(1)
    assert entropies([0.3]).relative == entropies([0.3]).normalised == 0
    assert entropies([1.0, 1.0]).raw == entropies([1.0, 1.0]).bernoulli == 0
    nothing = entropies([0.0, 0.0])
    assert all(math.isnan(value) for value in (nothing.normalised, nothing.relative, nothing.raw, nothing.bernoulli))
    with pytest.raises(ConfigError, match="from 0 to 1"):
        entropies([0.5, 1.5])


@settings(max_examples=40)
@given(st_.lists(st_.floats(0, 1), min_size=2, max_size=30))
def test_entropies_are_those_of_scipy(shares):
    from scipy.stats import entropy

    found = entropies(shares)
    if not any(shares):
        assert math.isnan(found.normalised)
        return
    assert found.normalised == pytest.approx(entropy(shares), abs=1e-9)
    assert found.bernoulli == pytest.approx(np.mean([entropy([p, 1 - p]) for p in shares]), abs=1e-9)
    assert -1e-12 <= found.relative <= 1 + 1e-12


def test_tensor_sparsity_begins_at_1_and_never_rises():
    grown = support([4, 4, 2, 8], a={0: 0, 1: 3}, b={3: 1}, d={7: 3})
    found = series(grown, steps=5)
    assert found["steps"] == [0, 1, 2, 3, 4, 5]
    assert found["tensor_sparsity"] == [1, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert found["selected"] == [0, 1, 2, 2, 4, 4]
    assert math.isnan(found["normalised"][0])
    assert found["raw"][-1] == spread(grown)["raw"]
    by_hand = series_of([(1, grown.until(0)), (2, grown.until(1)), (4, grown)])
    assert by_hand["tensor_sparsity"] == [1, 0.75, 0.5, 0.25]
    long = series(support([4, 4], a={0: 0, 1: 99_999}))
    assert len(long["steps"]) <= 201
    assert (long["steps"][-1], long["selected"][-1]) == (100_000, 2)


def test_supports_on_the_way_are_nested():
    grown = support([9, 9], a={0: 0, 1: 2, 5: 1}, b={3: 2})
    seen = [{(name, i) for name, flat in grown.until(t).entries.items() for i in flat.tolist()} for t in range(-1, 4)]
    assert [len(places) for places in seen] == [0, 1, 2, 4, 4]
    assert all(one <= two for one, two in itertools.pairwise(seen))
    with pytest.raises(ConfigError, match="is not known"):
        Support(grown.sizes, grown.entries).until(0)


@pytest.mark.parametrize(
    ("quotas", "given_", "static"), [([3, 3, 3, 3], 30, 48), ([2, 3, 2, 3], 24, 40), ([5, 0, 0], 15, 15), ([0], 0, 0)]
)
def test_update_counts(quotas, given_, static):
    found = update_counts(quotas)
    assert (found.given, found.static, found.uniform) == (given_, static, (len(quotas) + 1) * sum(quotas) / 2)
    alive = [sum(quotas[: t + 1]) for t in range(len(quotas))]
    assert found.given == sum(alive)


def test_uniform_updates_are_half_and_a_bit():
    for steps, each in ((4, 3), (7, 1), (10, 25)):
        assert update_counts([each] * steps).ratio == pytest.approx((steps + 1) / (2 * steps))


def trained(model: nn.Module, method: st.Method, steps: int, lr: float = 0.05, **save) -> Delta:
    """A delta of `model`, which is the base again afterwards."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    tuner = st.attach(model, method)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=lr)
    supports = []
    for step in range(steps):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if tuner.support:
            assert tuner.entropy == pytest.approx(spread(Support(sizes, tuner.support))["relative"], abs=1e-12)
        supports.append({(n, i) for n, flat in tuner.support.items() for i in flat.tolist()})
    delta = tuner.delta(**save)
    trained.supports = supports  # pyright: ignore[reportFunctionMemberAccess]
    tuner.detach()
    return delta


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))


@pytest.mark.parametrize(
    "method",
    [st.id3(25, steps=6), st.id3(25, steps=6, every=4), st.increment_pafi(7, steps=6), st.pafi(25)],
    ids=["id3", "every", "fewer scalars than steps", "static"],
)
def test_the_step_of_each_entry_is_the_one_that_selected_it(net, method):
    for order in (None, True):
        delta = trained(net, method, 6, order=order)
        found = support_of(Delta.from_bytes(delta.to_bytes()), net)
        _follows(found, delta)


def _follows(found, delta):
    for step, seen in enumerate(trained.supports):  # pyright: ignore[reportFunctionMemberAccess]
        assert {(n, i) for n, flat in found.until(step).entries.items() for i in flat.tolist()} == seen
    counts = histogram(found)
    assert sum(counts.values()) == delta.selected
    assert sum(row["selected"] for row in by_tensor(found)) == delta.selected
    assert update_counts([counts.get(t, 0) for t in range(6)]).given == sum(
        len(seen)
        for seen in trained.supports  # pyright: ignore[reportFunctionMemberAccess]
    )


def test_the_step_is_not_told_where_it_is_not_known(net):
    assert steps_of(trained(net, st.repeat_d3(25, steps=4), 4, order=True)) is None
    without = support_of(trained(net, st.id3(25, steps=4), 4, order=False), net)
    for ask in (histogram, by_tensor, series):
        with pytest.raises(ConfigError, match=r"not known|saved with order=False"):
            ask(without)


def test_what_has_no_support(net):
    with pytest.raises(ConfigError, match=r"no support to analyse: it trains 4 tensors whole.*--full"):
        support_of(trained(net, st.full(), 1), net)
    empty = Delta([], [], {"base": base_info(net)})
    with pytest.raises(ConfigError, match="it is empty"):
        support_of(empty, net)
    delta = trained(net, st.id3(25, steps=4), 4)
    with pytest.raises(BaseMismatchError, match=r"Linear is not the base of id3"):
        support_of(delta, nn.Linear(8, 12))


def test_shared_entries_and_what_chance_gives():
    one, two = support([4, 6], a={0: 0, 1: 0}, b={2: 0}), support([4, 6], a={1: 0, 3: 0}, b={2: 0, 4: 0})
    found = shared(one, two)
    assert (found["shared"], found["jaccard"], found["overlap"]) == (2, 2 / 5, 2 / 3)
    assert found["chance"]["shared"] == 3 * 4 / 10
    assert found["chance_within"]["shared"] == 2 * 2 / 4 + 1 * 2 / 6
    assert found["chance"]["overlap"] == pytest.approx(1.2 / 3)
    table = overlaps([one, two, one], ["x", "y", "z"])
    assert table["jaccard"] == [[1, 0.4, 1], [0.4, 1, 0.4], [1, 0.4, 1]]
    assert [pair["names"] for pair in table["pairs"]] == [["x", "y"], ["x", "z"], ["y", "z"]]
    with pytest.raises(BaseMismatchError, match=r'"b" has 6 entries in one run and 7 in the other'):
        shared(one, support([4, 7], a={1: 0}))
    with pytest.raises(ConfigError, match="at least two"):
        overlaps([one], ["x"])


def test_chance_is_the_mean_over_random_supports():
    draw, sizes = torch.Generator().manual_seed(0), {"a": 30, "b": 10}

    def drawn(**counts):
        return Support(
            sizes, {n: torch.randperm(sizes[n], generator=draw)[:k].sort().values for n, k in counts.items()}
        )

    found = [shared(drawn(a=12, b=2), drawn(a=5, b=6)) for _ in range(2000)]
    assert np.mean([row["shared"] for row in found]) == pytest.approx(found[0]["chance_within"]["shared"], abs=0.1)


def test_spearman():
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [16, 9, 4, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2], [1, 2, 3]) == pytest.approx(0.8660, abs=5e-5)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1], [2]))
    with pytest.raises(ConfigError, match="3 and 2"):
        spearman([1, 2, 3], [1, 2])


@settings(max_examples=40)
@given(st_.lists(st_.tuples(st_.integers(0, 5), st_.integers(0, 5)), min_size=3, max_size=40))
def test_spearman_is_scipys(pairs):
    from scipy.stats import spearmanr

    one, two = zip(*pairs, strict=True)
    if len(set(one)) == 1 or len(set(two)) == 1:
        assert math.isnan(spearman(one, two))
    else:
        assert spearman(one, two) == pytest.approx(float(spearmanr(one, two).statistic), abs=1e-9)


def test_how_far_entries_moved():
    base = nn.Linear(4, 1, bias=True)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        base.bias.fill_(1.0)
    old = base.weight.detach()[0, [0, 2, 3]]
    new = torch.tensor([1.5, 3.0, 4.0 + 2**-20])
    delta = Delta(
        [Patch.make("weight", (1, 4), torch.tensor([0, 2, 3]), new, old)],
        [Dense.make("bias", "parameter", torch.tensor([2.0]), base.bias.detach())],
        {"base": base_info(base)},
    )
    weight, bias = moved(delta, base)
    assert (weight["entries"], weight["written"], weight["unchanged"]) == (4, 3, 1)
    assert weight["mean_all"] == (0.5 + 2**-20) / 4
    assert weight["mean_written"] == (0.5 + 2**-20) / 3
    assert weight["below_epsilon"] == 1
    assert weight["lost_in"] == {"bfloat16": 1, "float16": 1}
    assert (bias["whole"], bias["mean_all"]) == (True, 1.0)
    assert by_group([weight, bias], {"weight": "x", "bias": "x"})["x"]["mean_written"] == (1.5 + 2**-20) / 4


def test_against_full_fine_tuning_with_a_control_of_equal_size(net):
    delta, full = trained(net, st.id3(40, steps=4), 4), trained(net, st.full(), 4)
    mine = support_of(delta, net)
    found = against_full(delta, full, net, mine)
    start = {name: tensor.detach().flatten() for name, tensor in net.named_parameters()}
    whole = {dense.name: dense.tensor.flatten() for dense in full.dense}
    one, two = [], []
    for name, flat in delta.support.items():
        own = (delta.values[name].double() - start[name][flat].double()).abs()
        far = (whole[name][flat].double() - start[name][flat].double()).abs()
        one += own[own > 0].tolist()
        two += far[own > 0].tolist()
    assert found["entries"] == found["control_entries"] == len(one)
    assert found["rho"] == spearman(one, two)
    assert found["inside"][-1] <= max(two)
    assert 0 < found["control_moved"] < len(one)
    assert against_full(delta, full, net, mine, seed=1)["control"] != found["control"]
    assert against_full(delta, full, net, mine) == found
    assert found["seeds"] == [0, 0]
    with pytest.raises(BaseMismatchError):
        against_full(delta, full, nn.Linear(8, 12), mine)


def test_theorem_1():
    found = check_theorem(seeds=3)
    assert (found.violations, found.counts) == (0, 3 * 3 * 2 * 12)
    assert found.negative > 0
    assert found.mean < 1e-15
    assert (found.example["I"], found.example["J"], found.example["H"], found.example["H of exp 2"]) == (1, 1, 2, 0.25)


def test_the_moments_are_those_of_autograd():
    draw = torch.Generator().manual_seed(1)
    inputs, weight = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, 2), (2, 4)))
    labels = torch.softmax(torch.randn(3, 4, generator=draw, dtype=torch.float64), -1)
    expected, fisher, size = Model(weight, inputs, labels).moments()
    sums = [torch.zeros_like(weight) for _ in range(3)]
    for row, chances in zip(inputs, labels, strict=True):
        for label, chance in enumerate(chances):
            w = weight.clone().requires_grad_()
            nn.functional.cross_entropy((row @ w)[None], torch.tensor([label])).backward()
            for total, part in zip(sums, (w.grad, w.grad.square(), w.grad.abs()), strict=True):
                total += chance / 3 * part
    for mine, theirs in zip((expected, fisher, size), sums, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)
    assert torch.equal(heuristic(torch.ones(1), torch.ones(1), 1.0, 1.0), torch.tensor([0.5]))
