"""Where two methods are equal, tests are rarely wrong: 1,000 simulated studies, and what n x n pairs do there."""

from __future__ import annotations

import numpy as np
import pytest

from selectune.study.stats import anova, holm, intervals, mcnemar, papers, permutation
from selectune.study.stats.wilcoxon import wilcoxon

STUDIES, ALPHA = 1000, 0.05
MOST = ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / STUDIES)
"""A test at its level is wrong more often than this in one of 700 simulations; the seeds are fixed."""


def runs(n: int, groups: int = 2, seed: int = 0) -> np.ndarray:
    """(studies, groups, n) runs of methods without a difference; runs of one seed have something in common."""
    rng = np.random.default_rng(seed)
    return 0.8 + rng.normal(0, 0.02, (STUDIES, 1, n)) + rng.normal(0, 0.02, (STUDIES, groups, n))


def errors(test, n: int, **more) -> float:
    return float(np.mean([test(*study) <= ALPHA for study in runs(n, **more)]))


@pytest.mark.parametrize(
    "test",
    [
        lambda a, b: wilcoxon(a - b).p,
        lambda a, b: wilcoxon(a - b, "two-sided").p,
        lambda a, b: wilcoxon(np.round(a - b, 2)).p,
        lambda a, b: permutation.sign_flips(a - b).p,
    ],
    ids=("wilcoxon", "two-sided", "tied", "signs"),
)
def test_paired_tests_keep_their_level(test):
    assert 0.01 < errors(test, 8) <= MOST


def independent(n: int, groups: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.8, 0.02, (STUDIES, groups, n))


def test_unpaired_tests_keep_their_level():
    labels = np.mean([permutation.labels([a], [b]).p <= ALPHA for a, b in independent(4, 2)])
    anovas = np.mean([anova.anova(list(study)).p <= ALPHA for study in independent(4, 3)])
    assert 0.01 < labels <= MOST
    assert 0.01 < anovas <= MOST


def test_pairs_of_each_run_with_each_are_wrong_far_too_often():
    """The papers' test of 2 budgets with 4 + 4 runs: the same simulation, in which the labels' exchange is right."""
    studies = independent(8, 2, seed=2)
    wrong = right = 0
    for a, b in studies:
        ours, theirs = {"103k": a[:4], "320k": a[4:]}, {"103k": b[:4], "320k": b[4:]}
        wrong += wilcoxon(papers.n_by_n(ours, theirs)).p <= ALPHA
        right += permutation.labels(list(ours.values()), list(theirs.values()), draws=5000).p <= ALPHA
    assert wrong / STUDIES > 3 * ALPHA
    assert right / STUDIES <= MOST


def test_mcnemar_keeps_its_level():
    rng = np.random.default_rng(3)
    hard = rng.uniform(0.5, 1, (STUDIES, 1, 277))
    scores = (rng.uniform(size=(STUDIES, 2, 277)) < hard).astype(float)
    assert 0.01 < np.mean([mcnemar.mcnemar(*study).p <= ALPHA for study in scores]) <= MOST


def test_one_false_finding_among_five_methods_is_as_rare_as_alpha():
    studies = runs(8, groups=6, seed=4)
    plain = adjusted = 0
    for study in studies:
        ps = [permutation.sign_flips(method - study[0]).p for method in study[1:]]
        plain += min(ps) <= ALPHA
        adjusted += min(holm.holm(ps)) <= ALPHA
    assert adjusted / STUDIES <= MOST
    assert plain / STUDIES > 2 * ALPHA


@pytest.mark.parametrize("seeds, rows, each", [(0.03, 0.0, 0.2), (0.02, 0.2, 0.2), (0.0, 0.5, 0.1)])
def test_three_seeds_are_enough_for_an_interval_over_seeds_and_items(seeds, rows, each):
    """Whichever of the two spreads more. It may miss less often than it says, but not never."""
    rng, missed = np.random.default_rng(7), 0
    for _ in range(STUDIES):
        table = rng.normal(0, seeds, (3, 1)) + rng.normal(0, rows, (1, 200)) + rng.normal(0, each, (3, 200))
        found = intervals.bootstrap(table, draws=500)
        missed += not found.low <= 0 <= found.high
    assert 0.005 < missed / STUDIES <= MOST


@pytest.mark.parametrize("way", ("student", "welch", "seeds", "seeds and items"))
def test_intervals_miss_nothing_as_rarely_as_they_say(way):
    rng = np.random.default_rng(5)
    missed = 0
    for a, b in runs(8, seed=6) if way != "welch" else independent(8, 2):
        if way == "welch":
            found = intervals.welch([a], [b])
        elif way == "student":
            found = intervals.student(a - b)
        elif way == "seeds":
            found = intervals.bootstrap(a - b, draws=1000)
        else:
            items = rng.normal(0, 0.2, (1, 20)) + rng.normal(0, 0.05, (8, 20))
            found = intervals.bootstrap((a - b)[:, None] + items, draws=400)
        missed += not found.low <= 0 <= found.high
    assert missed / STUDIES <= MOST
