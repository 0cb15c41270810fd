"""The metrics of the tasks: (predictions, labels) -> one number; higher is better, and it is never NaN."""

from __future__ import annotations

import logging
from collections.abc import Sequence

log = logging.getLogger("selectune")


def accuracy(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Share of rows where prediction and label agree.

    >>> accuracy([1, 0, 1, 1], [1, 0, 0, 1])
    0.75
    """
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def matthews(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Matthews correlation coefficient, -1 to 1; 0 where all predictions or all labels are the same.

    >>> round(matthews([1, 0, 1, 1], [1, 0, 0, 1]), 4)
    0.5774
    """
    if _constant("Matthews correlation", predictions, labels):
        return 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson_spearman(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Mean of the Pearson and the Spearman correlation; 0 where all predictions or all labels are the same.

    >>> round(pearson_spearman([1, 2, 3, 4], [1, 4, 9, 16]), 4)
    0.9922
    """
    if _constant("Pearson and Spearman correlation", predictions, labels):
        return 0.0
    from scipy.stats import pearsonr, spearmanr

    pearson = pearsonr(predictions, labels).statistic  # pyright: ignore[reportAttributeAccessIssue]
    spearman = spearmanr(predictions, labels).statistic  # pyright: ignore[reportAttributeAccessIssue]
    return float((pearson + spearman) / 2)


def multilabel_f1(predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, float]:
    """F1 over all decisions (`f1_micro`), and the mean of the F1 of each label (`f1_macro`).

    A row has a 0 or 1 for each label. What never occurs and is never predicted counts as 0.

    >>> multilabel_f1([[1, 1], [0, 1]], [[1, 0], [0, 1]])
    {'f1_micro': 0.8, 'f1_macro': 0.8333333333333333}
    """
    from sklearn.metrics import f1_score

    return {
        f"f1_{average}": float(f1_score(labels, predictions, average=average, zero_division=0))  # pyright: ignore
        for average in ("micro", "macro")
    }


def _constant(what: str, predictions: Sequence[float], labels: Sequence[float]) -> bool:
    for name, values in (("predictions", predictions), ("labels", labels)):
        if all(value == values[0] for value in values):
            log.warning(
                "All %d %s are %s, so the %s is not defined; it counts as 0.", len(values), name, values[0], what
            )
            return True
    return False
