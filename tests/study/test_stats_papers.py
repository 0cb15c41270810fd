"""The statistics that the paper prints follow from the figures that it prints (arXiv 2408.14470v2)."""

from __future__ import annotations

import numpy as np
import pytest
from paper_tables import COLUMNS, FULL_ON_GLUE, TABLE_3, TABLE_5, TABLE_6, TABLE_7
from scipy import stats as scipy

from selectune.errors import StudyError
from selectune.study.stats import papers
from selectune.study.stats.wilcoxon import wilcoxon


def test_table_3():
    found = wilcoxon(np.subtract(TABLE_3["id3"], TABLE_3["sparse-adapter"]))
    assert (found.statistic, found.p) == (9, 0.125)


@pytest.mark.parametrize("column", ("rouge1", "rouge2", "rougeL"))
def test_table_5(column):
    found = wilcoxon(np.subtract(TABLE_5["id3"][column], TABLE_5["pafi"][column]))
    assert (found.statistic, found.p) == (6, 0.125)


def test_table_6_names_its_baselines():
    """One number of seven rests on the noise of binary fractions: on AQuA, 1.2 stands twice among the differences.

    The paper prints a p of .69 for AddSub, but -0.3 stands there three times, so p is .75.
    """
    baselines = papers.best_baselines(TABLE_6, leave_out=("id3", "lora:r=32"))
    assert [baselines[column] for column in COLUMNS] == [
        "lora:r=2", "lora:r=2", "pafi", "pafi", "pafi", "lora:r=2", "lora:r=2"
    ]  # fmt: skip
    raw = [np.subtract(TABLE_6["id3"][column], TABLE_6[baselines[column]][column]) for column in COLUMNS]
    assert [wilcoxon(d).statistic for d in raw] == [4, 4, 4, 4, 6, 6, 10]
    assert [round(wilcoxon(d).p, 2) for d in raw] == [0.75, 0.69, 0.69, 0.69, 0.44, 0.44, 0.06]
    tied = [wilcoxon(papers.rounded(d)) for d in raw]
    assert [found.statistic for found in tied] == [4, 4, 4, 4, 6.5, 6, 10]
    assert tied[0].p == 0.75


def test_table_7_without_its_average():
    ours, theirs = TABLE_7["id3"], TABLE_7["pafi"]
    with pytest.raises(StudyError, match="'avg' is an average of the other columns"):
        papers.n_by_n(ours, theirs)
    keys = [key for key in ours if key[0] != "avg"]
    found = wilcoxon(papers.n_by_n({key: ours[key] for key in keys}, {key: theirs[key] for key in keys}))
    assert (found.n, found.statistic) == (12, 63)
    assert found.p == pytest.approx(0.032, abs=5e-4)
    with_average = wilcoxon([ours[key][0] - theirs[key][0] for key in ours])
    assert (with_average.n, with_average.statistic) == (14, 88)  # what the paper prints
    alone = {"avg": [1.0, 2.0]}
    assert len(papers.n_by_n(alone, alone)) == 4


def test_each_run_with_each_run():
    rng = np.random.default_rng(0)
    ours, theirs = ({budget: rng.normal(size=4) for budget in ("103k", "320k")} for _ in range(2))
    found = papers.n_by_n(ours, theirs, digits=None)
    assert found.shape == (32,)
    assert found[16 + 4 * 2 + 3] == ours["320k"][2] - theirs["320k"][3]
    theirs["320k"][0] = ours["320k"][0]
    test = wilcoxon(papers.n_by_n(ours, theirs))
    assert (test.n, test.zeros) == (31, 1)


def test_the_papers_p_of_32_pairs():
    """W+ as printed with 32 pairs without ties, and the p that belongs to it."""
    for statistic, p in ((465, 3.0e-5), (359, 0.039), (385, 0.011)):
        ranks = set()
        for rank in range(32, 0, -1):
            ranks |= {rank} if rank <= statistic - sum(ranks) else set()
        found = wilcoxon([rank if rank in ranks else -rank for rank in range(1, 33)])
        assert found.statistic == statistic
        assert found.p == pytest.approx(p, rel=0.05)
        assert found.p == scipy.wilcoxon(
            [rank if rank in ranks else -rank for rank in range(1, 33)], alternative="greater", method="exact"
        ).pvalue  # fmt: skip


def test_the_average_counts_mnli_twice():
    row = dict(zip(papers.NINE, FULL_ON_GLUE, strict=True))
    assert round(papers.nine_columns(row), 2) == 88.58
    row.pop("glue/mnli-mm")
    with pytest.raises(StudyError, match="missing: glue/mnli-mm"):
        papers.nine_columns(row)


def test_both_rules_of_the_papers():
    runs = [80.0, 90.0, 70.0, 85.0]
    assert papers.best_runs(runs) == 85
    assert papers.best_runs(runs, keep=4) == np.mean(runs)
    assert papers.best_runs(runs, lowest=True) == pytest.approx(235 / 3)
    with pytest.raises(StudyError, match="2 numbers; at least 3"):
        papers.best_runs([1.0, 2.0])


def test_a_baseline_is_never_full_fine_tuning_and_follows_the_direction_of_the_metric():
    table = {"full": {"a": [9.0]}, "lora": {"a": [1.0], "loss": [2.0]}, "pafi": {"a": [2.0], "loss": [1.0]}}
    assert papers.best_baselines(table, lowest=("loss",)) == {"a": "pafi", "loss": "pafi"}
    assert papers.best_baselines(table) == {"a": "pafi", "loss": "lora"}
    with pytest.raises(StudyError, match="no baseline for a"):
        papers.best_baselines({"full": {"a": [1.0]}})
    with pytest.raises(StudyError, match="same configurations"):
        papers.n_by_n({"a": [1.0]}, {"b": [1.0]})
