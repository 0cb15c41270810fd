"""McNemar's test: two models on the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selectune.errors import StudyError
from selectune.study.stats.given import Numbers, sample, scipy_stats


@dataclass(frozen=True)
class McNemar:
    """Of `rows` rows, only the first model is right on `first` and only the second on `second`."""

    first: int
    second: int
    rows: int
    p: float


def mcnemar(first: Numbers, second: Numbers) -> McNemar:
    """The exact two-sided test that two models err equally often. Scores are 1 where a model is right, else 0.

    p is binomial: of the rows on which one model alone is right, each is the first's with probability 1/2. It speaks
    of these two models, not of the methods: another seed is another model. Raises StudyError for scores of other rows
    or other values. Sources: McNemar (1947), Psychometrika 12; Dietterich (1998), for its use.

    >>> mcnemar([1, 1, 1, 1, 0], [0, 0, 0, 1, 0])
    McNemar(first=3, second=0, rows=5, p=0.25)
    """
    a, b = sample(first, name="the first scores"), sample(second, name="the second scores")
    if a.size != b.size:
        raise StudyError(f"McNemar's test needs the same rows for both models; got {a.size} and {b.size} scores.")
    if not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        raise StudyError("McNemar's test needs scores of 0 and 1; a score of parts, as of regression, has none.")
    only, other = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    p = float(scipy_stats().binomtest(only, only + other).pvalue) if only + other else 1.0
    return McNemar(only, other, a.size, p)
