"""Metrics against values worked out by hand."""

from __future__ import annotations

import logging
import math

import pytest

from selectune import tasks
from selectune.errors import TaskError
from selectune.tasks.metrics import accuracy, matthews, pearson_spearman


def test_accuracy():
    assert accuracy([1, 0, 1, 1], [1, 0, 0, 1]) == 0.75
    assert accuracy([2], [2]) == 1.0


def test_matthews():
    # tp 2, tn 1, fp 1, fn 0: (2 * 1 - 1 * 0) / sqrt(3 * 2 * 2 * 1)
    assert matthews([1, 0, 1, 1], [1, 0, 0, 1]) == pytest.approx(2 / math.sqrt(12), abs=1e-12)
    assert matthews([0, 1], [1, 0]) == -1.0


def test_pearson_and_spearman():
    # squares: ranks agree (1), Pearson 50 / sqrt(20 * 129) * 2 / 2
    pearson = 25 / math.sqrt(5 * 129)
    assert pearson_spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx((pearson + 1) / 2, abs=1e-12)
    # a tie takes the average rank: Spearman sqrt(3) / 2, Pearson the same
    assert pearson_spearman([1, 2, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2, abs=1e-12)


@pytest.mark.parametrize("metric", [matthews, pearson_spearman])
@pytest.mark.parametrize(("predictions", "labels"), [([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [1, 1, 1])])
def test_what_is_constant_counts_as_zero_and_is_said(metric, predictions, labels, caplog):
    with caplog.at_level(logging.WARNING, logger="selectune"):
        assert metric(predictions, labels) == 0.0
    assert "counts as 0" in caplog.text


def test_a_metric_needs_rows():
    with pytest.raises(TaskError, match="got 2 and 1"):
        tasks.get("glue/rte").scores([1, 0], [1])
    with pytest.raises(TaskError, match="got 0 and 0"):
        tasks.get("glue/rte").scores([], [])
