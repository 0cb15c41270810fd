"""Mean and spread of runs, and how large a difference is beside that spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selectune.study.stats.given import Numbers, sample


@dataclass(frozen=True)
class Spread:
    """`mean` of `n` runs and their standard deviation `sd` (n - 1); None for one run."""

    mean: float
    sd: float | None
    n: int


def spread(values: Numbers, name: str = "the runs") -> Spread:
    """Mean and standard deviation of a sample.

    >>> spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, sd=1.0, n=3)
    """
    array = sample(values, name=name)
    return Spread(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size)


def cohen_paired(differences: Numbers) -> float | None:
    """Cohen's d of pairs: the mean difference over the standard deviation of the differences.

    None where that is undefined: for one pair, and where all differences are equal. Source: Cohen (1988), section 2.3.5
    (d_z in Lakens 2013).

    >>> cohen_paired([1.0, 2.0, 3.0])
    2.0
    """
    array = sample(differences, name="the differences")
    return _over(array.mean(), array.var(ddof=1)) if array.size > 1 else None


def cohen(first: Numbers, second: Numbers) -> float | None:
    """Cohen's d of two samples: the difference of the means over the pooled standard deviation; None if undefined.

    Source: Cohen (1988), Statistical Power Analysis for the Behavioral Sciences, section 2.2.

    >>> cohen([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    1.0
    """
    a, b = sample(first, name="the first sample"), sample(second, name="the second sample")
    freedom = a.size + b.size - 2
    if freedom < 1:
        return None
    return _over(a.mean() - b.mean(), (((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / freedom)


def cliff(first: Numbers, second: Numbers) -> float:
    """Cliff's delta: P(first > second) - P(first < second) over all pairs, from -1 to 1.

    Source: Cliff (1993), Psychological Bulletin 114.

    >>> cliff([2.0, 3.0], [1.0, 2.0])
    0.75
    """
    a, b = sample(first, name="the first sample"), sample(second, name="the second sample")
    return float(np.sign(np.subtract.outer(a, b)).mean())


def _over(difference: np.floating, variance: np.floating) -> float | None:
    """A difference in standard deviations; None where the spread is no more than rounding."""
    return float(difference / np.sqrt(variance)) if np.sqrt(variance) > 1e-12 * abs(difference) else None
