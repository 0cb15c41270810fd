"""One-way analysis of variance: do several groups differ at all, and how much of the spread is between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selectune.errors import StudyError
from selectune.study.stats.given import Numbers, sample, scipy_stats


@dataclass(frozen=True)
class Anova:
    """F of `groups` groups with `n` observations in all. `eta_squared`: between the groups, of all sums of squares."""

    f: float
    p: float
    eta_squared: float
    groups: int
    n: int


def anova(groups: Sequence[Numbers]) -> Anova:
    """F = MS between / MS within, p from F(k - 1, n - k); eta squared = SS between / SS total, in [0, 1].

    The observations must be independent. Raises StudyError for fewer than two groups, for an empty one, and where no
    group has any spread, because F is undefined there. Source: Fisher (1925).

    >>> found = anova([[1, 2, 3], [2, 3, 4]])
    >>> round(found.f, 3), round(found.p, 4), round(found.eta_squared, 4)
    (1.5, 0.2879, 0.2727)
    """
    arrays = [sample(group, name=f"group {number}") for number, group in enumerate(groups, 1)]
    if len(arrays) < 2:
        raise StudyError(f"An analysis of variance needs at least two groups; got {len(arrays)}.")
    everything = np.concatenate(arrays)
    within = sum(((array - array.mean()) ** 2).sum() for array in arrays)
    total = ((everything - everything.mean()) ** 2).sum()
    if not within > 1e-24 * (everything**2).sum():
        raise StudyError("An analysis of variance needs spread within a group; all runs of each group are equal.")
    found = scipy_stats().f_oneway(*arrays)
    return Anova(float(found.statistic), float(found.pvalue), float(1 - within / total), len(arrays), everything.size)
