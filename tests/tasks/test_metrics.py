"""Metrics against values worked out by hand."""

from __future__ import annotations

import logging
import math
import sys

import pytest

from selectune import tasks
from selectune.errors import TaskError
from selectune.tasks.metrics import (
    accuracy,
    choice_accuracy,
    exact_match,
    f1,
    f1_macro,
    matthews,
    multilabel_f1,
    pearson_spearman,
    perplexity,
)


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


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_predictions_of_a_diverged_run_count_as_zero_and_are_counted(broken, caplog):
    with caplog.at_level(logging.WARNING, logger="selectune"):
        assert pearson_spearman([broken, 1.0, 2.0], [1.0, 2.0, 3.0]) == 0.0
    assert "1 of 3 predictions are not finite" in caplog.text


def test_f1_by_hand(caplog):
    # tp 2, fp 1, fn 1 of class 1; tp 1, fp 1, fn 1 of class 0
    assert f1([1, 0, 1, 1, 0], [1, 0, 0, 1, 1]) == pytest.approx(2 / 3, abs=1e-12)
    assert f1_macro([1, 0, 1, 1, 0], [1, 0, 0, 1, 1]) == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-12)
    assert f1_macro([2, 2], [0, 2]) == pytest.approx((0 + 2 / 3) / 2, abs=1e-12)  # class 1 does not occur
    assert f1([0, 0], [1, 1]) == f1([1, 1], [0, 0]) == 0.0
    with caplog.at_level(logging.WARNING, logger="selectune"):
        assert f1([0, 0], [0, 0]) == 0.0
    assert "None of 2 rows is of class 1" in caplog.text
    with pytest.raises(TaskError, match="classes 0 and 1, got 0, 2"):
        f1([0, 2], [0, 0])


def test_f1_of_several_classes_a_row():
    # class 0: tp 2, fp 1; class 1: fn 1; class 2: tp 1, fp 1, fn 1
    found = multilabel_f1([[1, 0, 1], [1, 0, 1], [1, 0, 0]], [[1, 1, 0], [1, 0, 1], [0, 0, 1]])
    assert found == pytest.approx({"f1_micro": 2 * 3 / (5 + 5), "f1_macro": (4 / 5 + 0 + 1 / 2) / 3}, abs=1e-12)
    assert multilabel_f1([[1], [0]], [[1], [1]]) == pytest.approx({"f1_micro": 2 / 3, "f1_macro": 2 / 3}, abs=1e-12)


@pytest.mark.parametrize(
    ("predictions", "labels", "which"),
    [([[0, 1], [1]], [[0, 1]] * 2, "prediction 2"), ([[0, 1]] * 2, [[0, 1], [0, 2]], "label 2"), ([[]], [[]], "of 0")],
)
def test_multilabel_rows_are_zeros_and_ones_of_one_length(predictions, labels, which):
    with pytest.raises(TaskError, match=which):
        multilabel_f1(predictions, labels)


def test_exact_match():
    assert exact_match(["a  b\n", "A", "x", ""], ["a b", "a", ["y", "x"], ""]) == 0.75
    with pytest.raises(TaskError, match="Row 1 has no reference"):
        exact_match(["a"], [[]])


def test_perplexity():
    assert perplexity([3 * math.log(2), 5 * math.log(2)], [3, 1]) == pytest.approx(4.0, abs=1e-12)  # of 4 tokens
    assert perplexity([0.0], [7]) == 1.0
    with pytest.raises(TaskError, match="0 tokens in all"):
        perplexity([1.0], [0])


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e6])
def test_perplexity_of_a_diverged_run_is_the_largest_float_and_is_said(loss, caplog):
    with caplog.at_level(logging.WARNING, logger="selectune"):
        assert perplexity([loss, 1.0], [1, 1]) == sys.float_info.max
    assert "counts as the largest float" in caplog.text


def test_choices_by_sum_and_by_length(caplog):
    rows = [
        [(-4.0, 2), (-6.0, 6)],  # the first by sum, the second by length
        [(-3.0, 1), (-2.0, 1), (-9.0, 9)],  # the second, the third
        [(-1.0, 1), (-1.0, 1)],  # equal: the first
        [(-math.inf, 1), (-5.0, 1)],
    ]
    assert choice_accuracy(rows, [0, 1, 0, 1]) == {"accuracy": 1.0, "accuracy_normalised": 0.5}
    assert choice_accuracy(rows, [1, 2, 1, 0]) == {"accuracy": 0.0, "accuracy_normalised": 0.5}
    with caplog.at_level(logging.WARNING, logger="selectune"):
        assert choice_accuracy([[(math.nan, 1), (-1.0, 1)]], [1]) == {"accuracy": 0.0, "accuracy_normalised": 0.0}
    assert "1 of 1 rows have a likelihood that is NaN" in caplog.text


@pytest.mark.parametrize(("row", "label"), [([(-1.0, 1)], 1), ([(-1.0, 1)], -1), ([(-1.0, 0)], 0), ([], 0)])
def test_choices_need_lengths_and_a_right_one(row, label):
    with pytest.raises(TaskError, match="Row 1 needs choices of at least one unit"):
        choice_accuracy([row], [label])


def test_a_metric_needs_rows():
    with pytest.raises(TaskError, match="got 2 and 1"):
        tasks.get("glue/rte").scores([1, 0], [1])
    with pytest.raises(TaskError, match="got 0 and 0"):
        tasks.get("glue/rte").scores([], [])
