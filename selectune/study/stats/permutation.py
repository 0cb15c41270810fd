"""Permutation tests of a mean difference: exact where the exchanges can be listed, else a seeded sample of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selectune.study.stats.given import Alternative, Numbers, beyond, blocks, direction, sample

_SOME = 20_000
"""Exchanges that are listed at most, and that are drawn beyond that."""


@dataclass(frozen=True)
class Permutation:
    """`difference`: the mean difference that was tested, among `cases` exchanges, all of them if `exact`."""

    difference: float
    p: float
    cases: int
    exact: bool


def sign_flips(
    differences: Numbers, alternative: Alternative = "greater", draws: int = _SOME, seed: int = 0
) -> Permutation:
    """The test of paired differences: under the null, each difference has either sign with equal chance.

    p = share of sign changes whose mean is at least as extreme; for drawn ones (1 + count) / (1 + draws). Raises
    StudyError for no differences. Sources: Fisher (1935); Phipson and Smyth (2010), arXiv 1603.05766, for the 1s.

    >>> sign_flips([1.0, 2.0, 3.0])
    Permutation(difference=2.0, p=0.125, cases=8, exact=True)
    """
    direction(alternative)
    array = sample(differences, name="the differences")
    n, exact = array.size, 2**array.size <= draws
    if exact:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (draws, n))
    return _outcome(signs @ array / n, float(array.mean()), alternative, exact)


def labels(
    first: Sequence[Numbers],
    second: Sequence[Numbers],
    alternative: Alternative = "greater",
    draws: int = _SOME,
    seed: int = 0,
) -> Permutation:
    """The test of unpaired runs: under the null, the runs of a configuration may exchange their methods.

    `first[i]`, `second[i]`: the runs of both methods in configuration i. The statistic is the mean over configurations
    of the difference of means; labels are exchanged only within a configuration. Raises StudyError for no
    configurations, or an empty one.

    >>> labels([[3.0, 4.0]], [[1.0, 2.0]]).p == 1 / 6
    True
    """
    direction(alternative)
    runs = blocks(first, second)
    observed = float(np.mean([a.mean() - b.mean() for a, b in runs]))
    exact = math.prod(math.comb(a.size + b.size, a.size) for a, b in runs) <= draws
    rng = np.random.default_rng(seed)
    null = np.zeros(1)
    for a, b in runs:
        both, n = np.concatenate([a, b]), a.size
        both = both - both.mean()
        chosen = _subsets(both.size, n) if exact else rng.permuted(_rows(draws, both.size), axis=1)[:, :n]
        sums = both[chosen].sum(1)
        differences = sums / n - (both.sum() - sums) / b.size
        null = np.add.outer(null, differences).ravel() if exact else null + differences
    return _outcome(null / len(runs), observed, alternative, exact)


def _subsets(of: int, size: int) -> NDArray[np.intp]:
    return np.array(list(itertools.combinations(range(of), size)), np.intp)


def _rows(count: int, width: int) -> NDArray[np.intp]:
    return np.tile(np.arange(width), (count, 1))


def _outcome(null: NDArray[np.float64], observed: float, alternative: str, exact: bool) -> Permutation:
    """An observed outcome is one of the cases, so it counts among drawn ones too."""
    count, own = int(beyond(null, observed, alternative).sum()), 0 if exact else 1
    return Permutation(observed, (count + own) / (null.size + own), null.size, exact)
