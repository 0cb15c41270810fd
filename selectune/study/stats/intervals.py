"""Intervals of a mean difference: Student's for pairs, Welch's for unpaired runs, a bootstrap over seeds and items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selectune.errors import StudyError
from selectune.study.stats.given import Numbers, blocks, sample, scipy_stats, share


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`, at `level`. `error`: the standard error of the mean, with `freedom` degrees of freedom."""

    low: float
    high: float
    level: float
    error: float
    freedom: float


def student(differences: Numbers, level: float = 0.95) -> Interval:
    """The interval mean +- t sd / sqrt(n) of paired differences. Raises StudyError for fewer than two.

    Exact for normal differences, at any n. Source: Student (1908), Biometrika 6.

    >>> found = student([1.0, 2.0, 3.0])
    >>> round(found.low, 3), round(found.high, 3)
    (-0.484, 4.484)
    """
    array = sample(differences, 2, "the differences")
    return _around(array.mean(), array.std(ddof=1) / np.sqrt(array.size), array.size - 1, level)


def welch(first: Sequence[Numbers], second: Sequence[Numbers], level: float = 0.95) -> Interval:
    """The interval of the mean over configurations of the difference of two means, without equal variances.

    `first[i]`, `second[i]`: the runs of both methods in configuration i, at least two each. The degrees of freedom are
    Welch's and Satterthwaite's: (sum v)^2 / sum (v^2 / (n - 1)), v = variance / n of each sample. Source: Welch (1947).

    >>> found = welch([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]])
    >>> round(found.freedom, 6), round(found.high, 3)
    (4.0, 2.267)
    """
    runs = blocks(first, second, 2)
    means = [a.mean() - b.mean() for a, b in runs]
    each = np.array([(array.var(ddof=1) / array.size, array.size - 1) for pair in runs for array in pair])
    parts, freedoms = each.T
    total = parts.sum()
    freedom = total**2 / (parts**2 / freedoms).sum() if total > 0 else freedoms.sum()
    return _around(np.mean(means), np.sqrt(total) / len(runs), freedom, level)


def bootstrap(differences: Numbers, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """The percentile interval of the mean difference over seeds, or over seeds and items. A seed gives the same bits.

    `differences`: (seeds,), or (seeds, items) with the difference of two models on every row. Seeds and items are
    drawn apart, and the drawn items are the same for all seeds, as the rows of a validation split are. Percentiles of
    n drawn numbers are too narrow by sqrt((n - 1) / n), and by the quantile z of the normal in place of Student's t
    with n - 1 degrees of freedom. Seeds are few and items many, so only what the drawn seeds change in a mean is
    widened, by sqrt(n / (n - 1)) t / z: 2.7 times for 3 seeds, 1.3 times for 8. That is right where seeds differ about
    normally, and too wide where a row's difference is another with each seed: what seed and row have only together
    counts three times (Owen). Wider tails of the whole, as Hesterberg has them for one way of drawing, would widen the
    items' part too, and for 3 seeds they lie beyond any number of draws.

    Raises StudyError for fewer than two seeds. Sources: Efron (1979); Owen (2007), Annals of Applied Statistics 1, for
    two ways of drawing at once; Hesterberg (2015), arXiv 1411.5279, for both causes of narrowness.

    >>> found = bootstrap([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    >>> found.low < 2.5 < 4.5 < found.high
    True
    """
    share(level, "The level")
    array = sample(differences, 2, "the differences", np.ndim(differences) or 1)
    table = array.reshape(len(array), -1)
    n, items = table.shape
    if n < 2:
        raise StudyError(f"A bootstrap over seeds needs at least two seeds; got {n}.")
    rng = np.random.default_rng(seed)
    means, of_seeds = np.empty(draws), np.empty(draws)
    block = max(1, 1_000_000 // items)
    for start in range(0, draws, block):
        count = min(block, draws - start)
        of_items = rng.multinomial(n, np.full(n, 1 / n), count) @ table / n
        of_seeds[start : start + count] = of_items.sum(1) / items - table.mean()
        if items > 1:
            of_items = np.take_along_axis(of_items, rng.integers(items, size=of_items.shape), axis=1)
        means[start : start + count] = of_items.sum(1) / items
    stats = scipy_stats()
    tail, unbiased = (1 - level) / 2, np.sqrt(n / (n - 1))
    wider = unbiased * stats.t.ppf(tail, n - 1) / stats.norm.ppf(tail)
    low, high = np.quantile(means + (wider - 1) * of_seeds, [tail, 1 - tail])
    error = (means + (unbiased - 1) * of_seeds).std()
    return Interval(float(low), float(high), level, float(error), n - 1)


def _around(mean: np.floating, error: np.floating, freedom: float, level: float) -> Interval:
    share(level, "The level")
    half = scipy_stats().t.ppf((1 + level) / 2, freedom) * error
    return Interval(float(mean - half), float(mean + half), level, float(error), float(freedom))
