"""Statistics: literal values, scipy's and brute force on tables without end, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as scipy

from selectune.errors import ConfigError, StudyError
from selectune.study.stats import anova, effects, given, holm, intervals, mcnemar, permutation, power
from selectune.study.stats.wilcoxon import smallest_p, wilcoxon

TABLES = range(20)
ALTERNATIVES = ("greater", "less", "two-sided")


def drawn(seed: int, ties: bool = False) -> np.ndarray:
    """Paired differences: 3 to 9 of them, some tied and some 0 if asked for."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0.3, 1.0, rng.integers(3, 10))
    return np.round(values) if ties else values


def all_signs(n: int) -> np.ndarray:
    return np.array(list(itertools.product((1, -1), repeat=n)))


def share_beyond(null: np.ndarray, observed: float, alternative: str) -> float:
    """By brute force; two-sided as twice the smaller tail, which is the same for a symmetric null."""
    upper, lower = (null >= observed - 1e-9).mean(), (null <= observed + 1e-9).mean()
    return {"greater": upper, "less": lower, "two-sided": min(1.0, 2 * min(upper, lower))}[alternative]


@pytest.mark.parametrize(
    ("differences", "statistic", "p"),
    [
        ([-0.17, 0.89, 0.54, 2.39], 9, 0.125),
        ([0.28, 0.16, 0.01], 6, 0.125),
        ([0.5, 0.9, 0.6, 0.2], 10, 0.0625),
        ([2, -1, 4, 1], 8.5, 0.1875),  # W+ >= 8.5 for {}, {1.5}, {1.5} of the negative ones: 3 of 16
    ],
)
def test_literal_signed_ranks(differences, statistic, p):
    found = wilcoxon(differences)
    assert (found.statistic, found.p, found.exact) == (statistic, p, True)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("seed", TABLES)
def test_signed_ranks_are_scipys_and_brute_forces(seed, alternative):
    for ties in (False, True):
        d = drawn(seed, ties)
        found, kept = wilcoxon(d, alternative), d[d != 0]
        if not kept.size:
            assert (found.p, found.n) == (1.0, 0)
            continue
        ranks = scipy.rankdata(np.abs(kept))
        null = (all_signs(kept.size) > 0) @ ranks
        assert found.statistic == ranks[kept > 0].sum()
        assert (found.n, found.zeros) == (kept.size, d.size - kept.size)
        assert found.p == pytest.approx(share_beyond(null, found.statistic, alternative), abs=1e-12)
        if not ties:
            assert found.p == scipy.wilcoxon(d, alternative=alternative).pvalue


def test_many_ranks_are_approximated_and_said_to_be():
    d = np.repeat([-1.0, 1.0, 2.0], 17)
    found = wilcoxon(d)
    assert not found.exact
    assert found.p == scipy.wilcoxon(d, alternative="greater", method="asymptotic").pvalue
    assert wilcoxon(d[:50]).exact
    assert wilcoxon(np.arange(1.0, 51)).exact
    assert not wilcoxon(np.arange(1.0, 52)).exact


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("seed", TABLES)
def test_permutations_are_brute_forces_and_scipys(seed, alternative):
    d = drawn(seed)
    found = permutation.sign_flips(d, alternative)
    assert found.exact
    assert found.p == pytest.approx(share_beyond(all_signs(d.size) @ d / d.size, d.mean(), alternative), abs=1e-12)

    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=4), rng.normal(0.5, 1, 3)
    found = permutation.labels([a], [b], alternative)
    mine = scipy.permutation_test(
        (a, b), lambda x, y: x.mean() - y.mean(), alternative="greater" if alternative == "two-sided" else alternative
    )
    assert found.cases == 35
    assert found.difference == pytest.approx(mine.statistic)
    if alternative != "two-sided":
        assert found.p == pytest.approx(mine.pvalue, abs=1e-12)
    else:  # unequal groups: the null has no symmetry, and both tails count by their distance from 0
        null = np.abs(mine.null_distribution)
        assert found.p == pytest.approx((null >= abs(mine.statistic) - 1e-9).mean(), abs=1e-12)


def test_labels_are_exchanged_within_a_configuration_only():
    first, second = [[3.0, 4.0], [13.0, 14.0]], [[1.0, 2.0], [11.0, 12.0]]
    found = permutation.labels(first, second)
    assert (found.p, found.cases, found.difference) == (1 / 36, 36, 2.0)
    worst = permutation.labels(first[::-1], second[::-1], "less")
    assert worst.p == 1.0


def test_drawn_permutations_are_near_the_exact_ones_never_zero_and_the_same_for_a_seed():
    d = drawn(3)
    some = permutation.sign_flips(d, draws=2**d.size - 1, seed=1)
    many = permutation.sign_flips(np.arange(1.0, 41), seed=5)
    assert not some.exact
    assert not many.exact
    assert many.p == 1 / 20_001
    assert many == permutation.sign_flips(np.arange(1.0, 41), seed=5)
    a, b = [0.0, 1.0], [*np.arange(0.1, 1.0, 0.1), 10.0]  # 66^2 exchanges, and a null that leans to one side
    exact, sampled = (permutation.labels([a, a], [b, b], "less", draws=draws) for draws in (5000, 4000))
    assert exact.exact
    assert not sampled.exact
    assert abs(exact.p - sampled.p) < 5 * np.sqrt(exact.p * (1 - exact.p) / 4000)


@pytest.mark.parametrize("seed", TABLES)
def test_intervals_and_power_are_scipys(seed):
    d = drawn(seed)
    found, test = intervals.student(d), scipy.ttest_1samp(d, 0)
    low, high = test.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=5), rng.normal(1, 3, 4)
    found, test = intervals.welch([a], [b], 0.9), scipy.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.9)
    assert (found.low, found.high, found.freedom) == pytest.approx((low, high, test.df))
    groups = [a, b, d]
    assert (anova.anova(groups).f, anova.anova(groups).p) == pytest.approx(tuple(scipy.f_oneway(*groups)))


def test_a_detectable_difference_is_detected_as_often_as_it_says():
    """By simulation: 4,000 t-tests of 5 normal pairs whose true difference is the smallest one to be seen."""
    for alternative in ("greater", "two-sided"):
        true = power.detectable(1 / np.sqrt(5), 4, alternative=alternative)
        d = np.random.default_rng(1).normal(true, 1, (4000, 5))
        found = (scipy.ttest_1samp(d, 0, axis=1, alternative=alternative).pvalue < 0.05).mean()
        assert abs(found - 0.8) < 5 * np.sqrt(0.8 * 0.2 / 4000)
    assert power.detectable(0.0, 4) == 0.0


def test_the_bootstrap_over_items_sees_their_spread_and_is_the_same_for_a_seed():
    rng = np.random.default_rng(2)
    seeds, items = rng.normal(0, 0.1, (8, 1)), rng.normal(0, 1.0, (1, 400))
    table = 0.2 + seeds + items
    both, alone = intervals.bootstrap(table), intervals.bootstrap(table.mean(1))
    expected = np.sqrt(seeds.var(ddof=1) / 8 + items.var() / 400)
    assert both.error == pytest.approx(expected, rel=0.05)
    assert alone.error == pytest.approx(seeds.std(ddof=1) / np.sqrt(8), rel=0.05)
    assert both == intervals.bootstrap(table)
    assert intervals.bootstrap(table, seed=1) != both
    assert intervals.bootstrap([0.25] * 6).high == 0.25
    normal = scipy.norm.ppf((np.arange(12) + 0.5) / 12)
    assert intervals.bootstrap(normal, draws=100_000).high == pytest.approx(intervals.student(normal).high, rel=0.02)
    wide = intervals.bootstrap(rng.normal(size=(4, 60_000)), draws=100)  # in blocks: 100 draws do not fit one
    assert wide.low < wide.high


def test_few_seeds_widen_their_own_part_of_the_bootstrap_and_not_that_of_the_items():
    rng = np.random.default_rng(3)
    items = rng.normal(0, 1, (1, 400))
    same = intervals.bootstrap(np.repeat(items, 3, axis=0))  # three seeds that agree
    assert same.high - same.low == pytest.approx(2 * 1.96 * items.std() / 20, rel=0.1)
    table = np.array([[0.175], [0.35], [0.4]]) + rng.normal(0, 0.3, (1, 40))
    few, many = (intervals.bootstrap(table, draws=draws) for draws in (2_000, 50_000))
    width = many.high - many.low
    assert (few.low, few.high) == pytest.approx((many.low, many.high), abs=0.05 * width)
    student = intervals.student(table.mean(1))
    assert student.high - student.low == pytest.approx(width, rel=0.25)


@pytest.mark.parametrize("seed", TABLES)
def test_holm_keeps_its_order_and_is_the_closed_test(seed):
    """Equal to the definition: a hypothesis stands if every set of hypotheses with it stands by Bonferroni."""
    ps = np.random.default_rng(seed).uniform(0, 0.2, 4)
    closed = [
        max(
            min(1.0, size * min(ps[list(others)]))
            for size in range(1, 5)
            for others in itertools.combinations(range(4), size)
            if at in others
        )
        for at in range(4)
    ]
    assert holm.holm(ps) == pytest.approx(closed)
    assert holm.holm([]) == []


def test_analysis_of_variance_and_its_effect_size():
    found = anova.anova([[1, 2, 3], [2, 3, 4]])
    assert found.f == pytest.approx(1.5)
    assert found.p == pytest.approx(0.2879, abs=5e-5)
    assert found.eta_squared == pytest.approx(1.5 / 5.5)  # F = (SSb / 1) / (SSw / 4): SSb 1.5, SSw 4
    with pytest.raises(StudyError, match="spread within a group"):
        anova.anova([[0.1, 0.1], [0.3, 0.3]])


def test_effect_sizes():
    assert effects.cohen([2, 4], [1, 3]) == pytest.approx(1 / np.sqrt(2))
    assert effects.cohen_paired([1.0]) is None
    assert effects.cohen_paired([0.3 - 0.2, 0.2 - 0.1]) is None
    assert effects.cohen([1.0], [2.0]) is None
    assert effects.cliff([1, 2], [1, 2]) == 0
    assert effects.cliff([3, 4], [1, 2]) == 1
    assert effects.spread([5.0]).sd is None


def test_mcnemar_is_the_binomial_test():
    first, second = [1] * 9 + [0] * 3 + [1, 0], [0] * 9 + [1] * 3 + [1, 0]
    found = mcnemar.mcnemar(first, second)
    assert (found.first, found.second, found.rows) == (9, 3, 14)
    assert found.p == scipy.binomtest(3, 12).pvalue
    assert mcnemar.mcnemar([1, 0], [1, 0]).p == 1.0


def test_the_smallest_p():
    assert [smallest_p(n) for n in (3, 4, 5)] == [0.125, 0.0625, 0.03125]
    assert smallest_p(1, "two-sided") == 1.0
    for n in (3, 4, 5):
        assert wilcoxon(range(1, n + 1)).p == permutation.sign_flips(list(range(1, n + 1))).p == smallest_p(n)


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        (lambda: wilcoxon([]), StudyError, "0 numbers; at least 1"),
        (lambda: wilcoxon([1.0, float("nan")]), StudyError, "Number 2 of the differences is nan"),
        (lambda: wilcoxon([[1.0]]), StudyError, "axis"),
        (lambda: wilcoxon(["much"]), StudyError, "must be numbers"),
        (lambda: wilcoxon([1.0], "grater"), ConfigError, "Did you mean greater"),
        (lambda: permutation.labels([], []), StudyError, "got 0 and 0"),
        (lambda: permutation.labels([[1.0]], [[]]), StudyError, "second method's runs"),
        (lambda: intervals.student([1.0]), StudyError, "at least 2"),
        (lambda: intervals.student([1.0, 2.0], 95), ConfigError, "between 0 and 1; got 95"),
        (lambda: intervals.bootstrap([[1.0, 2.0]]), StudyError, "at least two seeds"),
        (lambda: intervals.welch([[1.0, 2.0]], [[1.0]]), StudyError, "at least 2"),
        (lambda: holm.holm([1.5]), StudyError, "between 0 and 1"),
        (lambda: anova.anova([[1.0, 2.0]]), StudyError, "at least two groups"),
        (lambda: mcnemar.mcnemar([1, 0], [1]), StudyError, "got 2 and 1"),
        (lambda: mcnemar.mcnemar([0.5], [1]), StudyError, "scores of 0 and 1"),
        (lambda: power.power(1.0, 0.0, 3), StudyError, "above 0"),
        (lambda: effects.spread([]), StudyError, "the runs has 0"),
    ],
)
def test_what_is_refused(asked, error, says):
    with pytest.raises(error, match=says):
        asked()


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(ConfigError, match=r"selectune\[hf\]"):
        given.scipy_stats()
