"""Means, spreads and intervals of few runs by Student's t, in the place of `selectune.study.compare` for now."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from selectune.errors import StudyError

LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """The mean of some runs with their standard deviation, and the interval of the mean; None for a single run."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    runs: int


def summary(values: Sequence[float]) -> Summary:
    """The summary of at least one value: mean ± t sd / sqrt(n) with n - 1 degrees of freedom (Student 1908).

    >>> summary([1.0, 2.0, 3.0]).sd, round(summary([1.0, 2.0, 3.0]).high, 3)
    (1.0, 4.484)
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Summary(mean, None, None, None, count)
    try:
        from scipy import stats
    except ImportError as error:
        raise StudyError("Intervals need the package scipy: pip install 'selectune[study]'.") from error
    sd = statistics.stdev(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * sd / math.sqrt(count)
    return Summary(mean, sd, mean - half, mean + half, count)


def gap(mine: Mapping[int, float], other: Mapping[int, float]) -> Summary | None:
    """The difference of two methods' scores by seed, paired by seed; None if they have no seed in common.

    >>> gap({1: 0.5, 2: 0.75}, {1: 0.25, 2: 0.5, 3: 0.5})
    Summary(mean=0.25, sd=0.0, low=0.25, high=0.25, runs=2)
    """
    shared = [mine[seed] - other[seed] for seed in mine if seed in other]
    return summary(shared) if shared else None


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a share of `count` rows (Wilson 1927).

    >>> tuple(round(end, 3) for end in wilson(0.5, 100))
    (0.404, 0.596)
    """
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / scale, (middle + half) / scale
