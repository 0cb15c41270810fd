"""Means of few runs with their intervals, and differences from a reference, by the statistics of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from selectune.errors import StudyError
from selectune.study.compare import compare
from selectune.study.records import Record, Setting
from selectune.study.stats import effects, intervals
from selectune.study.stats.given import scipy_stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of some runs with their standard deviation, and its interval; None for a single run.

    `holm`: of a difference, Wilcoxon's p with Holm's correction over the methods of the task.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    runs: int
    holm: float | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """The estimate of at least one value, with Student's interval of the mean.

    >>> estimate([1.0, 2.0, 3.0]).sd, round(estimate([1.0, 2.0, 3.0]).high, 3)
    (1.0, 4.484)
    """
    of = effects.spread(values)
    if of.n < 2:
        return Estimate(of.mean, None, None, None, of.n)
    found = intervals.student(values, LEVEL)
    return Estimate(of.mean, of.sd, found.low, found.high, of.n)


def differences(records: Iterable[Record], reference: str) -> tuple[Mapping[Setting, Estimate], Sequence[str]]:
    """Every setting's difference from the reference, and what these numbers cannot say, in sentences.

    `reference`: a method as `selectune compare --against` takes it. Where nothing can be compared, the sentence says
    why.
    """
    try:
        found = compare(records, reference, alpha=1 - LEVEL, alternative="two-sided")
    except StudyError as why:
        return {}, [f"No differences are shown. {why}"]
    apart = {}
    for standing in found.standings:
        if (of := standing.difference) and not standing.pooled:
            ends = (of.interval.low, of.interval.high) if of.interval else (None, None)
            pairs = of.test.n + of.test.zeros
            apart[standing.settings[0]] = Estimate(of.mean, None, *ends, pairs, of.holm)
    return apart, found.warnings


def of_rows(share: float, count: int) -> tuple[float, float]:
    """The interval of a share of `count` rows (Wilson 1927).

    >>> tuple(round(end, 3) for end in of_rows(0.5, 100))
    (0.404, 0.596)
    """
    found = scipy_stats().binomtest(round(share * count), count).proportion_ci(LEVEL, "wilson")
    return float(found.low), float(found.high)
