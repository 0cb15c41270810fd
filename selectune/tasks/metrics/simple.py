"""Metrics of classes, scores and short answers: accuracy, correlations, F1, exact match."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from selectune.errors import TaskError

log = logging.getLogger("selectune")


def accuracy(predictions: Sequence[float | str], labels: Sequence[float | str]) -> float:
    """Share of rows where prediction and label agree.

    >>> accuracy([1, 0, 1, 1], [1, 0, 0, 1])
    0.75
    """
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def tag_accuracy(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    """Share of words whose tag is right, over the words of all rows. Rows whose lengths differ raise TaskError.

    >>> tag_accuracy([["DET", "NOUN"], ["VERB"]], [["DET", "VERB"], ["VERB"]])
    0.6666666666666666
    """
    for row, (tags, truth) in enumerate(zip(predictions, labels, strict=True), 1):
        if len(tags) != len(truth):
            raise TaskError(
                f"Row {row} has {len(truth)} tags and {len(tags)} predictions; each word needs one of both."
            )
    return accuracy([tag for row in predictions for tag in row], [tag for row in labels for tag in row])


def matthews(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Matthews correlation coefficient, -1 to 1; 0 where all predictions or all labels are the same.

    >>> round(matthews([1, 0, 1, 1], [1, 0, 0, 1]), 4)
    0.5774
    """
    if _undefined("Matthews correlation", predictions, labels):
        return 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson_spearman(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Mean of the Pearson and the Spearman correlation; 0 where all predictions or all labels are the same.

    Predictions that are not finite, as of a run that diverged, also give 0.

    >>> round(pearson_spearman([1, 2, 3, 4], [1, 4, 9, 16]), 4)
    0.9922
    """
    if _undefined("Pearson and Spearman correlation", predictions, labels):
        return 0.0
    from scipy.stats import pearsonr, spearmanr

    pearson = pearsonr(predictions, labels).statistic  # pyright: ignore[reportAttributeAccessIssue]
    spearman = spearmanr(predictions, labels).statistic  # pyright: ignore[reportAttributeAccessIssue]
    return float((pearson + spearman) / 2)


def f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """F1 of class 1 among the classes 0 and 1; 0 where no row is of class 1 and none is predicted to be.

    2 tp / (2 tp + fp + fn), from the true positives, false positives and false negatives. Other classes raise
    TaskError.

    >>> round(f1([1, 0, 1, 1], [1, 0, 0, 1]), 4)
    0.8
    """
    found = {*predictions, *labels}
    if found - {0, 1}:
        raise TaskError(
            f"F1 is of the classes 0 and 1, got {', '.join(map(str, sorted(found)[:10]))}. For more classes there is "
            "f1_macro, for several classes a row multilabel_f1."
        )
    from sklearn.metrics import f1_score

    if found == {0}:
        log.warning(
            "None of %d rows is of class 1 and none is predicted to be, so F1 is not defined; it counts as 0.",
            len(labels),
        )
    return float(f1_score(labels, predictions, zero_division=0))  # pyright: ignore[reportArgumentType]


def f1_macro(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Mean of the F1 of each class that occurs among the predictions or the labels.

    >>> round(f1_macro([0, 1, 2, 2], [0, 1, 1, 2]), 4)  # 1, 2/3, 2/3
    0.7778
    """
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro"))


def multilabel_f1(predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, float]:
    """F1 over all decisions (`f1_micro`), and the mean of the F1 of each class (`f1_macro`).

    A row has a 0 or 1 for each class. A class that never occurs and is never predicted counts as 0 in the mean. Rows
    of different length, and other values than 0 and 1, raise TaskError.

    >>> multilabel_f1([[1, 1], [0, 1]], [[1, 0], [0, 1]])
    {'f1_micro': 0.8, 'f1_macro': 0.8333333333333333}
    """
    classes = len(labels[0])
    for number, row in enumerate((*predictions, *labels)):
        if len(row) != classes or not classes or not set(row) <= {0, 1}:
            which = (
                f"label {number - len(predictions) + 1}" if number >= len(predictions) else f"prediction {number + 1}"
            )
            raise TaskError(f"Multi-label F1 takes a 0 or 1 for each of {classes} classes, got {row!r:.80} as {which}.")
    each = [f1(*columns) for columns in zip(zip(*predictions, strict=True), zip(*labels, strict=True), strict=True)]
    micro = f1([value for row in predictions for value in row], [value for row in labels for value in row])
    return {"f1_micro": micro, "f1_macro": sum(each) / classes}


def exact_match(predictions: Sequence[str], labels: Sequence[str | Sequence[str]]) -> float:
    """Share of texts that equal their reference, or one of several, up to white space at the ends and its width.

    >>> exact_match(["Paris ", "the  Seine", "paris"], ["Paris", ["Seine", "the Seine"], "Paris"])
    0.6666666666666666
    """
    pairs = zip(predictions, references(labels), strict=True)
    return sum(text.split() in [each.split() for each in known] for text, known in pairs) / len(labels)


def references(labels: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """The references of each row as a list. A row without any raises TaskError.

    >>> references(["one", ["one", "two"]])
    [['one'], ['one', 'two']]
    """
    found = [[label] if isinstance(label, str) else list(label) for label in labels]
    if not all(found):
        raise TaskError(f"Row {found.index([]) + 1} has no reference. Each row needs one text, or a list of some.")
    return found


def _undefined(what: str, predictions: Sequence[float], labels: Sequence[float]) -> bool:
    for name, values in (("predictions", predictions), ("labels", labels)):
        broken = sum(not math.isfinite(value) for value in values)
        if broken:
            log.warning(
                "%d of %d %s are not finite, so the %s is not defined; it counts as 0.", broken, len(values), name, what
            )
            return True
        if all(value == values[0] for value in values):
            log.warning(
                "All %d %s are %s, so the %s is not defined; it counts as 0.", len(values), name, values[0], what
            )
            return True
    return False
