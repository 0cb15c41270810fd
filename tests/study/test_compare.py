"""Comparisons: whose runs meet, what is found of them, what is warned of, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from scipy import stats as scipy

from selectune.errors import ConfigError, StudyError
from selectune.study.compare import compare
from selectune.study.comparing import caveats, layouts
from selectune.study.records import Items, Record, Setting
from selectune.study.stats import intervals, papers, permutation
from selectune.study.stats.power import detectable

ID3, LORA, PAFI = (0.70, 0.74, 0.71, 0.75, 0.73, 0.77), (0.69, 0.71, 0.70, 0.72, 0.69, 0.70), (0.6, 0.7, 0.6, 0.7, 0.6)


def runs(method: str, scores, task: str = "glue/rte", budget=None, **more) -> list[Record]:
    """Two evaluations of each run: the best one, .01 above the last, and the last. Seeds count from 0."""
    setting = Setting(more.pop("model", "demo"), task, method, more.pop("on", None), budget)
    told = {"phase": "main", "lr": 5e-4, "metric": "accuracy", "lowest": False, "steps": 10, "selected": 5}
    told |= {"examples": 100, **more}
    found = []
    for seed, score in enumerate(scores):
        if score is not None:
            cell = f"{setting}{told['phase']}{told['lr']}{seed}"
            found.append(Record(cell, setting=setting, seed=seed, step=5, value=score + 0.01, last=False, **told))
            found.append(Record(cell, setting=setting, seed=seed, step=10, value=score, last=True, **told))
    return found


STUDY = [*runs("lora:r=8", LORA), *runs("id3", ID3, budget=0.0017), *runs("pafi", PAFI, budget=0.0017)]


def of(found, method: str, task: str = "glue/rte", pooled: bool = False):
    return next(s for s in found.standings if (s.method, s.task, s.pooled) == (method, task, pooled))


def test_pairs_of_one_seed():
    found = compare(STUDY, "lora")
    d = np.round(np.subtract(ID3, LORA), 10)
    standing = of(found, "id3")
    got = standing.difference
    assert (standing.spread.mean, standing.spread.sd) == pytest.approx((np.mean(ID3), np.std(ID3, ddof=1)))
    assert found.against == {"glue/rte": "lora:r=8"}
    assert got.against == "lora:r=8"
    assert got.mean == pytest.approx(d.mean())
    assert (got.interval.low, got.interval.high) == pytest.approx(scipy.ttest_1samp(d, 0).confidence_interval())
    assert (got.test.n, got.test.statistic, got.test.p) == (6, 21, 1 / 64)
    assert got.p == got.test.p == got.permutation.p == got.smallest
    assert got.cohen == pytest.approx(d.mean() / d.std(ddof=1))
    assert got.cliff == pytest.approx(np.sign(np.round(np.subtract.outer(ID3, LORA), 10)).mean())
    assert got.detectable == pytest.approx(detectable(d.std(ddof=1) / np.sqrt(6), 5))
    other = of(found, "pafi").difference
    assert other.test.n == 5
    assert (got.holm, other.holm) == (2 / 64, other.p)
    assert of(found, "lora:r=8").difference is None
    assert found.anova["glue/rte"].f == pytest.approx(scipy.f_oneway(ID3, LORA, PAFI).statistic)


def test_the_papers_pairs():
    found = compare(STUDY, "lora", pairing="papers").standings
    got = next(s for s in found if s.method == "id3").difference
    assert got.test.n + got.test.zeros == 36
    assert got.test.p < got.permutation.p == got.p == permutation.labels([ID3], [LORA]).p
    assert got.smallest == 1 / 924
    assert got.interval == intervals.welch([ID3], [LORA])
    pooled_sd = np.sqrt((np.var(ID3, ddof=1) + np.var(LORA, ddof=1)) / 2)
    assert got.cohen == pytest.approx((np.mean(ID3) - np.mean(LORA)) / pooled_sd)


def test_two_budgets_of_four_runs_are_32_pairs_and_four_seeds():
    records = [*runs("fish", LORA[:4], budget=1000), *runs("fish", LORA[2:], budget=3000)]
    records += [*runs("id3", ID3[:4], budget=1000), *runs("id3", ID3[2:], budget=3000)]
    both = of(compare(records, "fish", pairing="papers"), "id3", pooled=True).difference
    assert both.test.n + both.test.zeros == 32
    assert both.permutation.cases == 70**2
    by_seed = of(compare(records, "fish"), "id3", pooled=True)
    means = (np.subtract(ID3[:4], LORA[:4]) + np.subtract(ID3[2:], LORA[2:])) / 2
    assert by_seed.difference.test.n == 4
    assert by_seed.difference.mean == pytest.approx(means.mean())
    assert by_seed.spread.n == 8
    alone = [*runs("lora:r=8", LORA), *(r for r in records if r.setting.method == "id3")]
    assert of(compare(alone, "lora"), "id3", pooled=True).difference.test.n == 4
    assert all(not s.pooled for s in compare(alone, "lora", pairing="papers").standings)


def test_a_loss_is_better_where_it_is_lower():
    low = {"metric": "perplexity", "lowest": True}
    found = compare([*runs("lora", ID3, **low), *runs("id3", LORA, **low)], "lora")
    got = of(found, "id3").difference
    assert got.mean < 0
    assert got.interval.high < 0
    assert got.cohen < 0
    assert got.p == 1 / 64
    crossed = compare([*runs("lora", ID3, **low), *runs("id3", LORA, **low)], "lora", pairing="papers")
    assert of(crossed, "id3").difference.mean == pytest.approx(got.mean)
    assert of(crossed, "id3").difference.cohen < 0
    assert of(crossed, "id3").difference.interval.high < 0
    assert of(crossed, "id3").difference.p < 0.05


def test_the_best_of_all_evaluations():
    found = compare(STUDY, "lora", rule="best")
    assert of(found, "id3").spread.mean == pytest.approx(np.mean(ID3) + 0.01)
    assert any("too good" in warning for warning in found.warnings)


def test_the_best_baseline_is_named_for_each_task_and_full_is_none():
    records = [*STUDY, *runs("full", [0.99] * 6), *runs("lora:r=8", [0.1] * 6, "glue/cola")]
    records += [*runs("id3", ID3, "glue/cola", 0.0017), *runs("pafi", LORA, "glue/cola", 0.0017)]
    found = compare(records, "best", methods=["id3"])
    assert found.against == {"glue/rte": "lora:r=8", "glue/cola": "pafi"}
    assert {s.method for s in found.standings} == {"id3", "lora:r=8", "pafi"}
    assert "lora:r=8 on glue/rte, pafi on glue/cola" in found.warnings[0]
    assert "chosen after seeing the results" in found.warnings[0]


def test_scores_of_rows_give_an_interval_over_both_and_mcnemar_by_seed():
    rng = np.random.default_rng(0)
    right = {"id3": rng.uniform(size=(6, 100)) < 0.8, "lora": rng.uniform(size=(6, 100)) < 0.6}
    records = [r for method, table in right.items() for r in runs(method, table.mean(1))]
    last = [r for r in records if r.last]
    items = {r.cell: Items(right[r.setting.method][r.seed].astype(float).tolist(), [], []) for r in last}
    got = of(compare(records, "lora", items=items), "id3").difference
    table = right["id3"].astype(float) - right["lora"]
    assert got.over_items == intervals.bootstrap(table, 0.95, 2000, 0)
    assert got.mcnemar[3].first == (table[3] == 1).sum()
    assert set(got.mcnemar) == set(range(6))
    assert of(compare(records, "lora", items=items, rule="best"), "id3").difference.over_items is None
    assert "seeds and rows" in layouts.markdown(compare(records, "lora", items=items))

    few = [r for r in records if r.seed < 3]
    assert of(compare(few, "lora", items=items), "id3").difference.over_items.freedom == 2
    assert caveats.FEW_SEEDS in compare(few, "lora", items=items).warnings
    assert caveats.FEW_SEEDS not in compare(records, "lora", items=items).warnings

    other = [dataclasses.replace(r, metric="F1", value=r.value + 0.1 * (r.setting.method == "id3")) for r in records]
    assert of(compare(other, "lora", items=items), "id3").difference.over_items is None  # not a mean over rows
    some = {cell: items[cell] for cell in list(items)[:-1]}
    assert len(of(compare(records, "lora", items=some), "id3").difference.mcnemar) == 5
    items[last[0].cell] = Items([1.0], [], [])
    with pytest.raises(StudyError, match="scores of 1 rows and of 100"):
        compare(records, "lora", items=items)


def test_scores_of_rows_are_those_of_the_task_that_the_difference_is_of():
    """Runs have one task and were measured on another; those of an earlier version kept no rows of the other."""
    own = {"id3": [1.0, 1.0, 1.0, 1.0], "lora": [1.0, 0.0, 0.0, 0.0]}
    other = {"id3": [0.0, 1.0], "lora": [1.0, 1.0]}
    records, items, earlier = [], {}, {}
    for method in own:
        trained = [r for r in runs(method, [np.mean(own[method])] * 3, examples=4) if r.last]
        setting = dataclasses.replace(trained[0].setting, task="glue/sst2")
        value = float(np.mean(other[method]))
        for record in trained:
            records += [record, dataclasses.replace(record, setting=setting, value=value, examples=2)]
            earlier[record.cell] = Items(own[method], [], [])
            items[record.cell] = Items(own[method], [], [], {"glue/sst2": Items(other[method], [], [])})
    found = compare(records, "lora", items=items)
    assert {m.rows for m in of(found, "id3").difference.mcnemar.values()} == {4}
    there = of(found, "id3", "glue/sst2").difference
    assert [(m.rows, m.first, m.second) for m in there.mcnemar.values()] == [(2, 0, 1)] * 3
    assert there.over_items.low < -0.5 < there.over_items.high
    assert not any("left out" in warning for warning in found.warnings)
    found = compare(records, "lora", items=earlier)
    assert len(of(found, "id3").difference.mcnemar) == 3
    there = of(found, "id3", "glue/sst2").difference
    assert (there.mcnemar, there.over_items) == ({}, None)
    assert sum("glue/sst2 without keeping" in warning for warning in found.warnings) == 1


def test_nobody_pays_for_the_base():
    """It has no rate that a search could miss, and it is no method that was tried."""
    base = runs("base", [0.1] * 6, steps=0)
    search = [r for method in ("lora:r=8", "id3") for r in runs(method, [0.5], phase="search", lr=1e-3)]
    study = [*runs("lora:r=8", LORA), *runs("id3", ID3), *search]
    alone, found = compare(study, "lora"), compare([*study, *base], "lora")
    assert of(found, "id3").difference == of(alone, "id3").difference
    assert found.anova == alone.anova
    assert not any("searched" in warning for warning in found.warnings)
    assert of(found, "base").difference.mean == pytest.approx(0.1 - np.mean(LORA))
    assert of(compare([*study, *base], "base"), "id3").difference.holm == 2 / 64


@pytest.mark.parametrize(("alternative", "marks"), [("greater", "*"), ("less", "†"), ("two-sided", "*†")])
def test_a_mark_says_on_which_side_a_method_is(alternative, marks):
    """Of a loss, below is better."""
    for lowest, (good, bad) in ((False, ("up", "down")), (True, ("down", "up"))):
        told = {"lowest": lowest}
        study = [
            *runs("full", [0.5 + i / 100 for i in range(8)], **told),
            *runs("up", [0.7 + i / 90 for i in range(8)], **told),
            *runs("down", [0.3 + i / 90 for i in range(8)], **told),
        ]  # fmt: skip
        found = compare(study, "full", alternative=alternative)
        cells = dict(layouts.scores(found)[1])
        assert cells[good].endswith("(8) *") == ("*" in marks)
        assert cells[bad].endswith("(8) †") == ("†" in marks)
        assert not cells["full"].endswith(("*", "†"))
        assert all(mark in layouts.legend(found) for mark in marks)
        assert r"$\dagger$" in layouts.latex(found) or "†" not in marks


def test_holms_correction_counts_in_what_could_pass():
    """The smallest p of six pairs is 1/64, and .05 / 3 lies above it, but .05 / 4 does not."""
    good = [0.8 + i / 100 for i in range(6)]
    for count, said in ((3, False), (4, True)):
        found = compare([*runs("full", LORA), *(r for k in range(count) for r in runs(f"m{k}", good))], "full")
        told = [warning for warning in found.warnings if "could not pass" in warning]
        assert bool(told) == said == (max(s.difference.holm for s in found.standings if s.difference) > 0.05)
    assert told[0].startswith(
        "So few runs that differ can give no p below 0.015625, and Holm's correction takes the smallest of 4 times 4, "
        "so these could not pass 0.05: m0 on glue/rte; "
    )


@pytest.mark.parametrize(
    ("records", "more", "says"),
    [
        ([*runs("a", ID3[:3]), *runs("b", LORA[:3])], {}, "no p below 0.125, so these could not pass 0.05: a on"),
        ([*runs("a", ID3), *runs("b", LORA)], {"pairing": "papers"}, "not independent"),
        ([*runs("a", ID3[:5]), *runs("b", LORA)], {}, "Missing seeds: a on glue/rte lacks 5."),
        ([*runs("a", [0.69, *ID3[1:]]), *runs("b", LORA)], {}, "dropped by Wilcoxon's test: 1 of 6 for a on glue/rte"),
        ([*STUDY, *runs("id3", ID3[:2], budget=0.0017, phase="search")], {}, "lora:r=8 had 0, id3 had 2, pafi had 0"),
        ([*runs("a", ID3, lr=1e-3), *runs("a", ID3), *runs("b", LORA)], {}, "Several learning rates were run"),
        ([*STUDY, *runs("id3", ID3, "glue/cola")], {}, "Not compared, because the reference has no run"),
        ([*runs("a", ID3 * 10), *runs("b", LORA * 10)], {}, "normal approximation"),
        (STUDY, {"alternative": "less"}, "does not show that methods are equal"),
    ],
)  # fmt: skip
def test_a_warning_is_given_once_where_it_applies(records, more, says):
    reference = "b" if any(r.setting.method == "b" for r in records) else "lora"
    found = compare(records, reference, **more)
    assert sum(says in warning for warning in found.warnings) == 1, found.warnings
    assert all(warning[0].isupper() and warning.endswith(".") for warning in found.warnings)
    assert not any(says in warning for warning in compare(STUDY, "lora", methods=["id3"]).warnings)


def test_three_runs_can_pass_a_level_of_an_eighth():
    records = [*runs("a", ID3[:3]), *runs("b", LORA[:3])]
    assert not any("can give no p" in warning for warning in compare(records, "b", alpha=0.125).warnings)


def test_equal_searches_are_no_cause_for_a_warning():
    searched = [r for method in ("a", "b") for r in runs(method, ID3[:3], phase="search")]
    found = compare([*runs("a", ID3), *runs("b", LORA), *searched], "b")
    assert not any("Rates were not searched" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("records", "more", "error", "says"),
    [
        ([], {}, StudyError, "no finished run among these 0 results"),
        (runs("lora", LORA, phase="search"), {}, StudyError, "search for rates do not count"),
        ([r for r in STUDY if not r.last], {}, StudyError, "no finished run"),
        (runs("lora", LORA), {}, StudyError, "The reference is the only method"),
        ([*runs("lora", [0.5]), *runs("id3", [None, 0.5])], {}, StudyError, "none of the same seed: id3 on glue/rte"),
        ([*runs("lora", [0.5, float("nan")])], {}, StudyError, "lora on glue/rte, seed 1.* has the score nan"),
        (STUDY, {"against": "lroa:r=8"}, ConfigError, "They have: lora:r=8, id3, pafi. Did you mean lora:r=8?"),
        (STUDY, {"methods": ["id4"]}, ConfigError, "no method 'id4'.*Did you mean id3?"),
        ([*STUDY, *runs("lora:r=2", LORA)], {}, ConfigError, "several methods of these results: lora:r=8, lora:r=2"),
        ([*STUDY, *runs("x", LORA, metric="F1")], {}, StudyError, "several metrics: accuracy and F1"),
        ([*STUDY, *runs("x", LORA, examples=50)], {}, StudyError, "several numbers of rows: 100 and 50"),
        ([*STUDY, *runs("x", LORA, lowest=True)], {}, StudyError, "several directions"),
        ([*STUDY, dataclasses.replace(STUDY[1], cell="other")], {}, StudyError, "such as the number of epochs"),
        (STUDY, {"rule": "lst"}, ConfigError, "No rule is 'lst'. Known: last, best. Did you mean last?"),
        (STUDY, {"pairing": "seeds"}, ConfigError, "Did you mean seed?"),
        (STUDY, {"alternative": "more"}, ConfigError, "Known: greater, less, two-sided"),
        (STUDY, {"alpha": 5}, ConfigError, "Alpha must lie between 0 and 1; got 5"),
        (STUDY, {"against": "best"}, ConfigError, "name the methods that are none"),
        (STUDY, {"against": "best", "methods": ["id3", "lora", "pafi"]}, StudyError, "No baseline on glue/rte"),
    ],
)  # fmt: skip
def test_what_is_refused(records, more, error, says):
    with pytest.raises(error, match=says):
        compare(records, **{"against": "lora", **more})


def test_one_run_has_a_difference_but_no_interval():
    found = compare([*runs("a", [0.7]), *runs("b", [0.6])], "b")
    for pairing in ("seed", "papers"):
        got = of(compare([*runs("a", [0.7]), *runs("b", [0.6])], "b", pairing=pairing), "a").difference
        assert got.mean == pytest.approx(0.1)
        assert (got.interval, got.cohen, got.detectable) == (None, None, None)
        assert got.p == got.smallest == 0.5
    assert found.anova == {}


@pytest.mark.parametrize("same", ([0.5] * 5, [0.5]))
def test_runs_without_a_difference(same):
    for pairing in ("seed", "papers"):
        found = compare([*runs("a", same), *runs("b", same)], "b", pairing=pairing)
        got = of(found, "a").difference
        assert (got.p, got.mean, got.cliff, got.test.n) == (1.0, 0.0, 0.0, 0)
        json.dumps(found.as_json(), allow_nan=False)


def test_the_same_comparison_for_the_same_records_in_any_order():
    found = compare(STUDY, "lora", pairing="papers")
    assert compare(STUDY, "lora", pairing="papers") == found
    by_method = sorted(STUDY, key=lambda r: -r.seed)
    assert of(compare(by_method, "lora"), "id3") == of(compare(STUDY, "lora"), "id3")


def test_tables():
    records = [*STUDY, *runs("lora:r=8", LORA, "a_b"), *runs("id3", ID3, "a_b", 0.0017), *runs("id3", ID3, "a_b", 500)]
    found = compare(records, "lora")
    header, rows = layouts.scores(found)
    assert header == ["method", "glue/rte", "a_b", "mean"]
    by_name = {row[0]: row for row in rows}
    assert by_name["id3, budget 0.17%"][1] == f"{np.mean(ID3):.4f} ± {np.std(ID3, ddof=1):.4f} (6) *"
    assert by_name["pafi"][2:] == ["-", "-"]
    assert by_name["lora:r=8"][3] == f"{np.mean(LORA):.4f}"
    assert [row[0] for row in layouts.details(found, "a_b")[1]] == [
        "lora:r=8", "id3, budget 0.17%", "id3, budget 500", "id3, all 2 settings"
    ]  # fmt: skip
    told = list(csv.DictReader(io.StringIO(layouts.comma_separated(found))))
    assert len(told) == len(found.standings)
    assert float(told[1]["p"]) == of(found, "id3").difference.p
    assert told[0]["against"] == ""
    tex = layouts.latex(found)
    assert r"a\_b" in tex
    assert r"$\pm$" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 3
    for warning in found.warnings:
        assert f"% {warning}" in tex
        assert f"- {warning}" in layouts.markdown(found)


def test_table_1_of_the_papers_has_this_shape():
    """Nine columns, so that the mean counts MNLI twice."""
    records = [r for task in papers.NINE for r in (*runs("id3", ID3, task), *runs("lora", LORA, task))]
    header, rows = layouts.scores(compare(records, "lora"))
    assert header[-1] == "mean"
    assert len(header) == 11
    assert rows[0][-1] == f"{papers.nine_columns({task: float(np.mean(ID3)) for task in papers.NINE}):.4f}"
