"""Several comparisons at once: Holm's correction, which bounds the chance of any false one."""

from __future__ import annotations

import numpy as np

from selectune.errors import StudyError
from selectune.study.stats.given import Numbers, sample


def holm(ps: Numbers) -> list[float]:
    """Adjusted p-values, in the order of the given ones: a comparison stands at alpha if its own is below alpha.

    The k-th smallest of m becomes max over j <= k of (m - j + 1) p_j, at most 1. Valid for dependent tests. Raises
    StudyError for a p outside [0, 1]. Source: Holm (1979), Scandinavian Journal of Statistics 6.

    >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    array = sample(ps, 0, "the p-values")
    if ((array < 0) | (array > 1)).any():
        raise StudyError(f"A p-value lies between 0 and 1; got {array.tolist()}.")
    order = np.argsort(array, kind="stable")
    adjusted = np.empty_like(array)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(array[order] * np.arange(array.size, 0, -1)))
    return adjusted.tolist()
