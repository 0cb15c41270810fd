"""Results: lines are read back as they were written, once each, and a cut line is left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from study_kit import record

from selectune.errors import StudyError
from selectune.study.cells import Cell
from selectune.study.grid import read_grid
from selectune.study.records import line_of, of_runs, read_results
from selectune.study.summary import export


def test_lines_are_read_back_once_each(tmp_path):
    written = [record(1, 0.5, 5, False), record(1, 0.625), record(2, 0.25)]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(map(line_of, [*written, written[0]])))
    assert read_results(path) == written
    assert read_results(tmp_path / "none") == []


def test_a_line_that_was_cut_is_left_out_and_any_other_fault_is_told(tmp_path):
    path = tmp_path / "results.jsonl"
    whole = line_of(record(1, 0.5))
    for cut in range(len(whole)):
        path.write_text(whole + line_of(record(2, 0.5))[:cut])
        assert read_results(path) == [record(1, 0.5)]
    path.write_text(whole[:40] + "\n" + whole)
    with pytest.raises(StudyError, match="line 1 is no result"):
        read_results(path)


@pytest.mark.parametrize("name, value", [("value", "x"), ("cell", []), ("step", None), ("last", "no"), ("more", 3)])
def test_a_line_with_values_of_other_types_is_no_result(tmp_path, name, value):
    told = record(1, 0.5).as_json()
    for wrong in ({**told, name: value}, {**told, "setting": {**told["setting"], "task": []}}):
        (tmp_path / "r.jsonl").write_text(json.dumps(wrong) + "\n")
        with pytest.raises(StudyError, match="line 1 is no result"):
            read_results(tmp_path / "r.jsonl")


def test_budgets_of_several_types_are_exported(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install 'selectune[study]'")
    found = [record(1, 0.5), record(2, 0.5)]
    found[1] = dataclasses.replace(found[1], setting=dataclasses.replace(found[1].setting, budget="lora:r=1"))
    export(found, tmp_path / "r.parquet")
    assert pandas.read_parquet(tmp_path / "r.parquet")["setting_budget"].tolist() == ["0.0017", "lora:r=1"]


def test_the_score_of_a_run_is_its_last_or_its_best():
    found = [record(1, 0.75, 5, False), record(1, 0.5), record(2, 0.25), record(3, 1.0, phase="search")]
    assert of_runs(found) == {found[0].setting: {1: 0.5, 2: 0.25}}
    assert of_runs(found, "best") == {found[0].setting: {1: 0.75, 2: 0.25}}


def test_keys_follow_from_what_changes_numbers():
    cell = Cell("main", {"model": "demo", "task": "glue/rte", "budget": 1000})
    same = [{"lr": 5e-4}, {"method": "id3:exp=2"}, {"out": "elsewhere"}, {"data": "there"}]
    other = [{"lr": 1e-4}, {"seed": 7}, {"method": "id3:exp=1"}, {"budget": 1001}, {"max_steps": 3}]
    assert {cell.with_(**change).key for change in same} == {cell.key}
    assert len({cell.key, *(cell.with_(**change).key for change in other)}) == 1 + len(other)
    assert Cell("search", cell.settings).key != cell.key


def test_rows_of_ones_own_are_told_by_what_is_in_them(tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,1\nb,0\n")
    told = {"model": "demo", "budget": 1000, "train": str(rows), "text": ("text",), "label": "label", "hold_out": 0.5}
    before = Cell("main", told).key
    assert Cell("main", told).key == before
    rows.write_text("text,label\na,1\nb,1\n")
    assert Cell("main", told).key != before


@pytest.mark.parametrize("name", ["core", "on-lora", "forgetting"])
def test_results_that_are_committed_belong_to_the_study_that_ships(name):
    """A key that changed would run finished cells again."""
    grid = read_grid(name)
    committed = [r for r in read_results(Path(__file__).parents[2] / f"docs/results/{name}.jsonl") if r.last]
    if grid.search:
        keys = {cell.key for arm in grid.arms for cell in grid.trials(arm)}
        committed = [record for record in committed if record.phase == "search"]
    else:
        keys = {cell.key for arm in grid.arms for cell in grid.cells(arm, None)}
    assert len(committed) > 10
    assert {record.cell for record in committed} <= keys
