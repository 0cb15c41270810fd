"""What a language model's log-likelihoods say: perplexity, and the answer among several choices."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence

from selectune.errors import TaskError

log = logging.getLogger("selectune")


def perplexity(predictions: Sequence[float], labels: Sequence[int]) -> float:
    """exp of the mean loss per token; lower is better, and 1 is the least.

    `predictions`: the summed negative log-likelihood of each row, in nats. `labels`: how many tokens were predicted in
    it. A loss that is not finite, or too large for its exponential, counts as the largest float. No tokens at all raise
    TaskError.

    >>> round(perplexity([2 * math.log(8), math.log(8)], [2, 1]), 6)
    8.0
    """
    tokens = sum(labels)
    if len(predictions) != len(labels) or tokens < 1:
        raise TaskError(f"Perplexity needs a loss and a number of tokens for each row, got {len(predictions)} losses "
                        f"and {len(labels)} numbers, {tokens} tokens in all.")  # fmt: skip
    mean = math.fsum(predictions) / tokens if all(map(math.isfinite, predictions)) else math.nan
    if mean <= math.log(sys.float_info.max):
        return math.exp(mean)
    log.warning("The mean loss of %d tokens is %g nats, so perplexity counts as the largest float.", tokens, mean)
    return sys.float_info.max


def choice_accuracy(predictions: Sequence[Sequence[tuple[float, int]]], labels: Sequence[int]) -> dict[str, float]:
    """Share of rows whose right choice is the likeliest, by its sum of log-likelihoods and by that sum per unit.

    `predictions`: for each choice of a row (sum of its log-likelihoods, its length in tokens or bytes). `labels`: the
    number of the right choice. The first of equal choices counts as the answer. A row with NaN counts as wrong.
    Source: Brown et al. (2020, arXiv 2005.14165, section 2.4), for both; over lengths in characters they are `acc` and
    `acc_norm` of EleutherAI's lm-evaluation-harness.

    >>> choice_accuracy([[(-4.0, 2), (-6.0, 6)]], [1])  # -4 > -6, but -2 < -1
    {'accuracy': 0.0, 'accuracy_normalised': 1.0}
    """
    right = normalised = broken = 0
    for row, (choices, label) in enumerate(zip(predictions, labels, strict=True), 1):
        if label not in range(len(choices)) or any(length < 1 for _, length in choices):
            raise TaskError(
                f"Row {row} needs choices of at least one unit and the right one's number among them; "
                f"got {choices!r:.80} and {label}."
            )
        if any(math.isnan(total) for total, _ in choices):
            broken += 1
            continue
        sums, means = [total for total, _ in choices], [total / length for total, length in choices]
        right += sums.index(max(sums)) == label
        normalised += means.index(max(means)) == label
    if broken:
        log.warning("%d of %d rows have a likelihood that is NaN; they count as wrong.", broken, len(labels))
    return {"accuracy": right / len(labels), "accuracy_normalised": normalised / len(labels)}
