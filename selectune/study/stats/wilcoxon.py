"""The Wilcoxon signed-rank test of paired differences, and the smallest p that a number of pairs can give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selectune.study.stats.given import Alternative, Numbers, direction, sample, scipy_stats

_EXACT = 50
"""So many differences at most have an exact p."""


@dataclass(frozen=True)
class SignedRank:
    """`statistic`: W+, the sum of the ranks of positive differences. `n` differences are not 0; `zeros` are dropped.

    `exact`: p is the share of all 2^n signs; else it comes from the normal approximation.
    """

    statistic: float
    n: int
    zeros: int
    p: float
    exact: bool


def wilcoxon(differences: Numbers, alternative: Alternative = "greater") -> SignedRank:
    """The signed-rank test that differences are symmetric about 0. Zeros are dropped; ties get their mean rank.

    W+ = sum of rank(|d_i|) over d_i > 0, at most n (n + 1) / 2. p is exact for up to 50 differences, with ties too.
    Raises StudyError for no differences. Source: Wilcoxon (1945), Biometrics Bulletin 1.

    >>> wilcoxon([-0.17, 0.89, 0.54, 2.39])
    SignedRank(statistic=9.0, n=4, zeros=0, p=0.125, exact=True)
    """
    direction(alternative)
    array = sample(differences, name="the differences")
    kept = array[array != 0]
    n, zeros = kept.size, array.size - kept.size
    if not n:
        return SignedRank(0.0, 0, zeros, 1.0, True)
    stats = scipy_stats()
    ranks = stats.rankdata(np.abs(kept))
    statistic = float(ranks[kept > 0].sum())
    if n <= _EXACT and np.unique(ranks).size < n:
        p = _tied(ranks, statistic, alternative)
    else:
        p = float(stats.wilcoxon(kept, alternative=alternative).pvalue)
    return SignedRank(statistic, n, zeros, p, n <= _EXACT)


def _tied(ranks: NDArray[np.float64], statistic: float, alternative: Alternative) -> float:
    """p from the distribution of W+ over all signs: each rank, a multiple of 1/2, is in the sum or not."""
    chance = np.ones(1)
    for rank in np.rint(2 * ranks).astype(int):
        apart = np.zeros(rank)
        chance = (np.concatenate([chance, apart]) + np.concatenate([apart, chance])) / 2
    at = round(2 * statistic)
    tails = {"greater": chance[at:].sum(), "less": chance[: at + 1].sum()}
    return float(tails.get(alternative, min(1.0, 2 * min(tails.values()))))


def smallest_p(pairs: int, alternative: Alternative = "greater") -> float:
    """The smallest p that any test of the signs of n pairs can give: 2^-n, or twice that for two sides.

    >>> smallest_p(3), smallest_p(4), smallest_p(5, "two-sided")
    (0.125, 0.0625, 0.0625)
    """
    direction(alternative)
    return min(1.0, 2.0**-pairs * (2 if alternative == "two-sided" else 1))
