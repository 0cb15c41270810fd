"""Grids: every cell once, methods without a budget once, searches that are fair; and what is no grid is told."""

from __future__ import annotations

import json

import pytest
from cli_kit import call

from selectune.errors import StudyError
from selectune.study.grid import Search, names, of_mapping, read_grid
from selectune.study.workspace import Workspace, begin

PLAIN = {
    "name": "t",
    "tasks": ["glue/rte"],
    "methods": ["id3"],
    "budgets": ["0.17%", "1k"],
    "settings": {"max_steps": 3, "train_fully": ["classifier.*"]},
}


def arms(**more):
    return [(arm.setting.method, arm.setting.on, arm.setting.budget) for arm in of_mapping(PLAIN | more, "x").arms]


def test_a_method_has_a_row_for_each_budget_that_it_takes():
    assert arms(methods=["id3", "full", "lora:r=2", "bitfit"]) == [
        ("id3", None, 0.0017), ("id3", None, 1000), ("full", None, None), ("lora:r=2", None, None),
        ("bitfit", None, None),
    ]  # fmt: skip
    assert arms(methods=["id3+lora:r=2", {"method": "pafi", "budget": "lora:r=1"}, {"method": "full", "lr": 1e-3}]) == [
        ("id3", "lora:r=2", 0.0017), ("id3", "lora:r=2", 1000), ("pafi", None, "lora:r=1"), ("full", None, None),
    ]  # fmt: skip
    assert arms(on=[None, "lora:r=2"], methods=["id3", "lora:r=2"], budgets=["1k"]) == [
        ("id3", None, 1000), ("id3", "lora:r=2", 1000), ("lora:r=2", None, None),
    ]  # fmt: skip


def test_what_a_method_names_itself_is_never_left_out():
    assert arms(methods=["full+lora:r=8", {"method": "bitfit", "on": "lora:r=2"}]) == [
        ("full", "lora:r=8", None), ("bitfit", "lora:r=2", None),
    ]  # fmt: skip
    with pytest.raises(StudyError, match="full' takes no budget"):
        arms(methods=[{"method": "full", "budget": 100}])


def test_a_tasks_own_options_are_before_those_of_all():
    grid = of_mapping(PLAIN | {"tasks": [{"task": "glue/rte", "max_steps": 7}, "glue/mrpc"], "budgets": ["1k"]}, "x")
    assert [arm.settings["max_steps"] for arm in grid.arms] == [7, 3]


def test_whole_tensors_are_trained_where_a_method_takes_them():
    grid = of_mapping(PLAIN | {"methods": ["id3", "full", "lora:r=2"]}, "x")
    assert [arm.settings.get("train_fully") for arm in grid.arms] == [["classifier.*"]] * 2 + [None] * 2


def test_every_method_has_as_many_trials_around_its_own_rate():
    grid = of_mapping(PLAIN | {"methods": ["id3", "full"], "search": {"factors": [0.5, 2], "seeds": [8, 9]}}, "x")
    assert grid.search == Search((0.5, 2), (8, 9))
    for arm, own in zip(grid.arms, (5e-4, 5e-4, 5e-5), strict=True):
        trials = arm.trials(grid.search)
        assert [(cell.config.learning_rate, cell.config.seed) for cell in trials] == [
            (own * 0.5, 8), (own * 0.5, 9), (own * 2, 8), (own * 2, 9),
        ]  # fmt: skip
        assert all(cell.config.hold_out == 0.1 for cell in trials)
        assert [cell.config.hold_out for cell in grid.cells(arm, 1e-3)] == [None]


def test_options_of_an_adapter_may_have_a_plus():
    methods = ["lora:r=2,targets=query+value", "pafi+lora:r=2,targets=query+value"]
    assert arms(methods=methods, budgets=["1k"]) == [
        ("lora:r=2,targets=query+value", None, None), ("pafi", "lora:r=2,targets=query+value", 1000),
    ]  # fmt: skip


def test_a_method_with_settings_of_its_own_has_a_name():
    grid = of_mapping(
        PLAIN | {"methods": ["full", {"method": "full", "include": ["classifier.*"], "name": "head"}]}, "x"
    )
    assert [arm.setting.method for arm in grid.arms] == ["full", "head"]
    assert len({grid.cells(arm, None)[0].key for arm in grid.arms}) == 2


def test_the_base_is_a_row_without_training():
    search = {"factors": [0.5, 2], "seeds": [8]}
    grid = of_mapping(PLAIN | {"methods": ["base", "id3"], "search": search, "seeds": [1, 2]}, "x")
    base = grid.arms[0]
    assert (base.setting.method, base.setting.budget, grid.trials(base)) == ("base", None, [])
    assert base.settings == {"model": "demo", "method": "base", "task": "glue/rte"}
    assert len({cell.key for cell in grid.cells(base, None)}) == 2
    other = of_mapping(PLAIN | {"methods": ["base", "full"], "settings": {"max_steps": 9}, "seeds": [1, 2]}, "x")
    assert [c.key for c in other.cells(other.arms[0], None)] == [c.key for c in grid.cells(base, None)]
    assert not {c.key for c in other.cells(other.arms[1], None)} & {c.key for c in grid.cells(base, None)}
    paired = of_mapping(PLAIN | {"methods": ["base"], "seeds": [], "runs": [{"lr": 1e-3, "seed": 6}]}, "x")
    assert [cell.settings["seed"] for cell in paired.cells(paired.arms[0], None)] == [6]


NOT_OF_BASE = [
    ({"methods": [{"method": "base", "lr": 1e-3}]}, "takes no lr"),
    ({"methods": [{"method": "base", "rates": [1e-3]}], "search": {"factors": [1]}}, "takes no rates"),
    ({"methods": ["base+lora:r=2"]}, "takes no on"),
    ({"methods": ["base"], "settings": {"quantise": "int8"}}, "takes no quantise"),
    ({"methods": ["base"], "settings": {"hold_out": 0.1}}, "hold_out measures the other methods on training rows"),
    ({"methods": ["base"], "tasks": [{"task": "glue/rte", "quantise": "int8"}]}, "takes no quantise"),
    ({"methods": [{"method": "base", "name": "base, alone"}]}, "has a comma"),
    ({"methods": ["base"], "settings": {"max_step": 1}}, "max_step is no option of a run"),
]


@pytest.mark.parametrize(("change", "message"), NOT_OF_BASE, ids=[message for _, message in NOT_OF_BASE])
def test_what_is_of_training_is_refused_for_the_base(change, message):
    with pytest.raises(StudyError, match=message):
        of_mapping(PLAIN | change, "x")


def test_a_study_of_files_is_the_same_from_every_folder(tmp_path, monkeypatch):
    for name, label in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / f"{name}.csv").write_text(f"text,label\nx,{label}\n")
    (tmp_path / "text.txt").write_text("a text")

    def asked(train):
        rows = {"train": train, "validation": train, "text": "text", "label": "label", "retain": "text.txt"}
        return of_mapping({"name": "t", "tasks": [rows], "methods": ["full"], "settings": {"max_steps": 3}}, "x")

    def keys(grid):
        return [cell.key for cell in grid.cells(grid.arms[0], None)]

    monkeypatch.chdir(tmp_path)
    grid = asked("a.csv")
    begin("s", grid)
    wanted = keys(grid)
    assert keys(asked("b.csv")) == wanted  # by what is in it, wherever it lies
    assert keys(asked("c.csv")) != wanted
    monkeypatch.chdir(tmp_path.parent)
    again = Workspace(tmp_path / "s").grid
    assert keys(again) == wanted
    assert again.arms[0].settings["retain"] == str(tmp_path / "text.txt")


def test_tasks_of_files_with_one_name_have_names(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.csv").write_text(f"text,label\n{folder},1\n")
    tasks = [
        {"train": str(tmp_path / of / "rows.csv"), "hold_out": 0.5, "text": ["text"], "label": "label"} for of in "ab"
    ]
    with pytest.raises(StudyError, match="Give one of the methods or tasks a name"):
        of_mapping(PLAIN | {"tasks": tasks}, "x")
    grid = of_mapping(PLAIN | {"tasks": [tasks[0], {**tasks[1], "name": "other rows"}], "budgets": ["1k"]}, "x")
    assert [arm.setting.task for arm in grid.arms] == ["rows.csv", "other rows"]
    assert {cell.title for arm in grid.arms for cell in grid.cells(arm, None)} == {None, "other rows"}


def test_a_method_may_stay_out_of_the_search():
    methods = ["id3", {"method": "random", "budget": 1, "lr": 1e-12, "search": False, "name": "untuned"}]
    grid = of_mapping(PLAIN | {"methods": methods, "budgets": ["1k"], "search": {"factors": [1, 4]}}, "x")
    assert [len(grid.trials(arm)) for arm in grid.arms] == [2, 0]
    (cell,) = grid.cells(grid.arms[1], None)
    assert cell.config.learning_rate == 1e-12


def test_runs_pair_rates_and_seeds_as_the_papers_do():
    runs = [{"lr": lr, "seed": seed} for lr, seed in ((1e-4, 6), (3e-4, 7), (5e-4, 8), (7e-4, 9))]
    grid = of_mapping(PLAIN | {"runs": runs}, "x")
    found = [(cell.config.lr, cell.config.seed) for cell in grid.cells(grid.arms[0], None)]
    assert found == [(1e-4, 6), (3e-4, 7), (5e-4, 8), (7e-4, 9)]


def test_a_grid_is_written_and_read_again(tmp_path):
    grid = of_mapping(PLAIN | {"search": {"factors": [1, 2]}}, "x")
    (tmp_path / "study.json").write_text(json.dumps({"name": "t", "grid": grid.as_json()}))
    again = read_grid(tmp_path)
    assert again == grid
    assert [a.settings for a in again.arms] == [a.settings for a in grid.arms]


def test_one_text_is_a_list_of_one():
    rows = {"train": "my.csv", "hold_out": 0.1, "text": "question", "label": "topic"}
    grid = of_mapping(PLAIN | {"tasks": [rows], "settings": {"include": "layer.*"}, "budgets": ["1k"]}, "x")
    (cell,) = grid.cells(grid.arms[0], None)
    assert (cell.config.text, cell.config.include) == (("question",), ("layer.*",))


@pytest.mark.parametrize("name", names())
def test_the_studies_that_ship_can_be_run(name):
    assert read_grid(name).arms


@pytest.mark.parametrize(
    "change, why",
    [
        ({"tasks": []}, "names no tasks"),
        ({"name": ""}, "has no name"),
        ({"modles": ["demo"]}, r"a study has no modles\..*Did you mean models"),
        ({"methods": ["id4"]}, "cannot be run: Unknown method 'id4'"),
        ({"methods": ["id3:exq=1"]}, "takes no option exq"),
        ({"methods": [{"budget": 3}]}, "names no method"),
        ({"methods": ["id3", "id3:exp=2"]}, "has a cell twice"),
        ({"methods": ["full", {"method": "full", "include": ["classifier.*"]}]}, "two rows of a table under one name"),
        ({"tasks": ["glue/rtt"]}, "glue/rtt"),
        ({"budgets": ["0"]}, "at least 1 scalar"),
        ({"budgets": ["many"]}, "this is no number"),
        ({"seeds": ["a"]}, "seeds must be integers"),
        ({"settings": {"max_stepz": 3}}, r"max_stepz is no option of a run\..*Did you mean max_steps"),
        ({"settings": {"max_steps": 0}}, "max_steps=0"),
        ({"settings": 3}, "settings must be options"),
        ({"search": {"factors": []}}, "factors above 0"),
        ({"search": {"rates": 3}}, "search takes factors"),
        ({"settings": {"seed": 9}}, "settings has seed, which is an axis; write it under seeds"),
        ({"seeds": []}, "names no seeds"),
        ({"runs": [{"lr": 1e-3}, {"lr": 1e-4}]}, "two runs of id3 have one seed"),
        ({"measure": ["glue/nope"]}, "glue/nope"),
        ({"measure": ["glue/mrpc"], "tasks": ["glue/rte", "glue/stsb"]}, "names the measured task only"),
        ({"measure": ["glue/rte"]}, "names the measured task only"),
        ({"search": {}, "settings": {"hold_out": 0.2}}, "the rate on the same rows"),
        ({"search": {}, "methods": [{"method": "id3", "runs": [{"seed": 6}]}]}, "not both"),
        ({"search": {"factors": 3}}, "a list of factors"),
        (
            {"search": {}, "methods": [{"method": "id3", "rates": ["a"]}]},
            "rates in entry 1 of methods must be a list of",
        ),
        ({"search": {}, "methods": [{"method": "id3", "rates": 0.1}]}, "must be a list of numbers above 0, got 0.1"),
        ({"search": {"hold_out": "10%"}}, "hold_out of search must be a share .*, got '10%'"),
        ({"search": {"factors": [float("inf")]}}, "a list of factors above 0"),
        ({"models": [3]}, "entry 1 of models must be the name of a model, got 3"),
        ({"models": [["demo"]]}, "entry 1 of models must be the name of a model, got .'demo'."),
        ({"models": [None]}, "entry 1 of models must be the name of a model, got None"),
        ({"models": [" "]}, "entry 1 of models must be the name of a model"),
        ({"methods": ["id3", 3]}, "entry 2 of methods must be a method, or a mapping"),
        ({"measure": [3]}, "entry 1 of measure must be the name of a task, got 3"),
        ({"on": [3]}, "entry 1 of on must be an adapter"),
        ({"budgets": [[1]]}, "entry 1 of budgets must be a number or a text"),
        ({"budgets": [True]}, "entry 1 of budgets must be a number or a text"),
        ({"question": 3}, "question must be a text, got 3"),
        ({"runs": [3]}, "entry 1 of runs must be a mapping"),
        ({"runs": [{"fop": 3}]}, "fop in entry 1 of runs is no option of a run"),
        ({"methods": [{"method": "id3", "runs": [3]}]}, "runs in entry 1 of methods must be a list of mappings"),
        ({"methods": [{"method": "id3", "runs": [{"sead": 3}]}]}, "sead in runs in entry .* Did you mean seed"),
        ({"settings": {"lr": [0.1]}}, "lr in settings must be a number, got .0.1."),
        ({"settings": {"max_steps": "3"}}, "max_steps in settings must be an integer, got '3'"),
        ({"settings": {"max_steps": True}}, "max_steps in settings must be an integer, got True"),
        ({"settings": {"include": [3]}}, "include in settings must be a text or a list, each entry a text, got .3."),
        ({"tasks": [{"train": 3}]}, "train in entry 1 of tasks must be a text, got 3"),
        ({"methods": [{"method": "id3", "rates": [1e-3]}]}, "rates, which are those of a search"),
        ({"search": {}, "methods": [{"method": "id3", "search": 3}]}, "true or false"),
        ({"methods": [{"method": "id3", "name": 3}]}, "must be a text, got 3"),
        ({"tasks": [3]}, "entry 1 of tasks must be the name of a task, or a mapping"),
        ({"search": {"seeds": [1]}}, "need seeds of their own"),
        ({"search": {}, "runs": [{"seed": 1}]}, "not both"),
        ({"search": {}, "methods": [{"method": "id3", "rates": [1e-3]}, "pafi"]}, "as many trial rates"),
    ],
)
def test_what_is_no_grid_is_told(change, why):
    with pytest.raises(StudyError, match=why):
        of_mapping(PLAIN | change, "grid.yaml")


def test_files_that_are_no_grid_are_one_line(tmp_path):
    for text, why in (("[1", "neither YAML nor JSON"), ("3", "expected a study"), ("a: &x 1\nb: *x", "aliases")):
        (tmp_path / "grid.yaml").write_text(text)
        assert why in call("study", "run", tmp_path / "grid.yaml", "--out", tmp_path / "s", code=1).stderr
    assert "no study of this name" in call("study", "plan", "nowhere", code=1).stderr
    assert not (tmp_path / "s").exists()
