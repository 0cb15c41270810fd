"""A study that runs: nothing is lost, nothing runs twice, whatever dies; and both engines give the same table."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_kit import call
from study_kit import grid, rows

from selectune.errors import RunFolderError, StoppedError, StudyError
from selectune.files import checkpoints, own
from selectune.runs.stop import Stop
from selectune.study.cells import Cell
from selectune.study.engines import Local
from selectune.study.grid import STUDY, of_mapping, setting_of
from selectune.study.records import RESULTS, Record, read_results
from selectune.study.report.material import gather
from selectune.study.report.shown import content
from selectune.study.runner import run_study
from selectune.study.workspace import CELL, DONE, Workspace, begin

pytest_plugins = ("tiny_fixtures",)
KILLS = int(os.environ.get("KILLS", 1))
"""The long form of the test of kills has 20."""


def numbers(folder: Path) -> dict:
    """What a study measured, without times."""
    return {
        (r.cell, r.step, r.last): (r.setting, r.lr, r.seed, r.value, r.selected) for r in Workspace(folder).records()
    }


class Counting(Local):
    """Counts the starts of each cell."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots, 1)
        self.starts: list[str] = []

    def start(self, folder: Path) -> None:
        self.starts.append(folder.name)
        super().start(folder)


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    search = {"factors": [1, 4], "seeds": [9], "hold_out": 0.2}
    return of_mapping(grid(tiny, tmp_path_factory.mktemp("rows"), methods=["id3"], search=search), "grid")


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "s"
    counts = run_study(begin(folder, asked), Counting(2))
    assert (counts.done, counts.failed, counts.ready, counts.waiting) == (4, 0, 0, 0)
    return folder


def test_a_study_runs_trials_first_and_then_every_seed_at_the_best_rate(whole, asked):
    records = Workspace(whole).records()
    last = [r for r in records if r.last]
    assert [r.phase for r in last] == ["search"] * 2 + ["main"] * 2
    for arm in asked.arms:
        mine = [r for r in last if r.setting == arm.setting]
        trials = {r.lr: r.value for r in mine if r.phase == "search"}
        best = max(trials, key=lambda lr: (trials[lr], -lr))
        assert {(r.lr, r.seed) for r in mine if r.phase == "main"} == {(best, 1), (best, 2)}
        assert {r.examples for r in mine} == {8, 20}
    assert {(r.step, r.last) for r in records} == {(2, False), (3, True)}
    items = json.loads((whole / "cells" / last[-1].cell / "items.json").read_text())
    assert sum(items["scores"]) / 20 == last[-1].value
    assert not (whole / "cells" / last[0].cell / "delta.safetensors").exists()
    assert (whole / "cells" / last[-1].cell / "delta.safetensors").exists()


def test_rows_stand_in_the_grids_order_whenever_their_cells_ended(whole, tmp_path):
    wanted = [record.cell for record in Workspace(whole).records()]
    assert len(set(wanted)) > 2
    other = shutil.copytree(whole, tmp_path / "other")
    lines = (other / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (other / "results.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    assert list(dict.fromkeys(r.cell for r in Workspace(other).records())) == list(dict.fromkeys(wanted))


def test_done_cells_never_run_again_and_a_wider_grid_runs_the_rest(whole, asked):
    engine = Counting(2)
    run_study(begin(whole, asked), engine)
    assert engine.starts == []
    before = numbers(whole)
    wider = dataclasses.replace(asked, seeds=(1, 2, 3))
    run_study(begin(whole, wider), engine)
    assert len(engine.starts) == 1
    assert before.items() < numbers(whole).items()
    run_study(begin(whole, asked), engine)
    assert numbers(whole) == before
    with pytest.raises(StudyError, match="holds the study small, not other"):
        begin(whole, dataclasses.replace(asked, name="other"))


def test_results_that_were_cut_come_back_from_the_cells(whole, asked):
    before, data = numbers(whole), (whole / RESULTS).read_bytes()
    for end in (len(data) - 3, data.index(b"\n") + 20, 0):
        (whole / RESULTS).write_bytes(data[:end])
        engine = Counting(1)
        run_study(begin(whole, asked), engine)
        assert engine.starts == []
        assert numbers(whole) == before
        assert (whole / RESULTS).read_bytes().endswith(b"\n")


def test_a_study_that_is_killed_again_and_again_has_the_same_numbers(whole, asked, tmp_path):
    """SIGKILL of the runner: its cells end with it, and the next one goes on."""
    folder, rng = tmp_path / "s", random.Random(1)
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(asked.as_json()))
    line = [sys.executable, "-m", "selectune", "study", "run", str(file), "--out", str(folder), "--workers", "2"]
    for _ in range(KILLS):
        running = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(4, 14))
        running.kill()
        running.wait()
    subprocess.run([*line, "--threads", "1"], check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert numbers(folder) == numbers(whole)
    lines = [(r.cell, r.step, r.last) for r in read_results(folder / RESULTS)]
    assert len(lines) == len(set(lines)) == len((folder / RESULTS).read_text().splitlines())


def test_a_failure_is_told_and_does_not_stop_the_others(tiny, tmp_path):
    methods = [{"method": "id3", "budget": 10**9}, {"method": "full", "lr": 1e30}, "pafi"]
    asked = of_mapping(grid(tiny, tmp_path, methods=methods, seeds=[1]), "grid")
    workspace = begin(tmp_path / "s", asked)
    engine = Counting(3)
    counts = run_study(workspace, engine)
    assert (counts.done, counts.failed) == (2, 1)  # a run that diverges is done
    found = {failure.kind: failure.why for failure in workspace.failures()}
    assert "is larger than the" in found["BudgetError"]
    assert "loss is" in found["NonFiniteError"]
    assert len(engine.starts) == 3  # an error of ours would be raised again
    engine = Counting(1)
    run_study(workspace, engine)
    assert len(engine.starts) == 1  # only what may have been mended since
    told = call("study", "status", tmp_path / "s").stdout
    assert "BudgetError" in told
    assert "2 cells done, 1 to run" in told


def sentiment(folder: Path, monkeypatch) -> None:
    """A folder of published tasks with a few rows of SST-2, for the processes of cells too."""
    (folder / "glue" / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        found = [json.dumps({"sentence": f"dog {i}", "label": i % 2}) for i in range(7)]
        (folder / "glue" / "sst2" / f"{split}.jsonl").write_text("\n".join(found) + "\n")
    monkeypatch.setenv("SELECTUNE_DATA", str(folder))


def test_what_runs_say_of_rows_of_a_measured_task_is_kept_and_no_time_is_told_twice(tiny, tmp_path, monkeypatch):
    sentiment(tmp_path / "data", monkeypatch)
    told = grid(tiny, tmp_path, methods=["pafi", "random"], seeds=[1], measure=["glue/sst2"])
    workspace = begin(tmp_path / "s", of_mapping(told, "grid"))
    assert run_study(workspace, Counting(2)).done == 2
    ended = [record for record in workspace.records() if record.last]
    assert [(r.setting.task, r.examples, "seconds" in r.more) for r in ended] == [
        ("train.jsonl", 20, True), ("glue/sst2", 7, False)
    ] * 2  # fmt: skip
    found = json.loads(call("compare", tmp_path / "s", "--against", "random", "--json").stdout)["standings"]
    rows = {s["task"]: s["difference"]["mcnemar"]["1"]["rows"] for s in found if s["difference"]}
    assert rows == {"train.jsonl": 20, "glue/sst2": 7}
    (board,) = content(gather(tmp_path / "s")).boards
    for _, result in board.of("glue/sst2"):
        assert "seconds" not in result.costs
        assert [len(line) for line in result.lines["metric"]] == [1]  # evaluations on the way are of the other task
    assert "seconds" in board.of("train.jsonl")[0][1].costs
    assert "0 s" not in call("report", tmp_path / "s", "--format", "md", "--out", "-").stdout
    assert "about" in call("study", "plan", tmp_path / "s", "--out", tmp_path / "s").stdout


@pytest.mark.parametrize(
    "measured, kind, why",
    [("glue/rte", "TaskError", "has no validation"), ("glue/stsb", "ConfigError", "has another head")],
)
def test_a_task_that_cannot_be_measured_is_told_before_training_and_once(
    tiny, tmp_path, monkeypatch, measured, kind, why
):
    sentiment(tmp_path / "data", monkeypatch)
    told = grid(tiny, tmp_path, methods=["pafi"], seeds=[1], tasks=["glue/sst2"], measure=[measured])
    workspace, engine = begin(tmp_path / "s", of_mapping(told, "grid")), Counting(1)
    assert run_study(workspace, engine).failed == len(engine.starts) == 1
    (failure,) = workspace.failures()
    assert failure.kind == kind
    assert why in failure.why
    assert not list(workspace.folder(failure.cell).glob("*.safetensors"))


def test_a_process_that_dies_is_tried_again(tiny, tmp_path):
    asked = of_mapping(grid(tiny, tmp_path, methods=["pafi"], seeds=[1]), "grid")
    workspace = begin(tmp_path / "s", asked)

    class Dying(Counting):
        def start(self, folder: Path) -> None:
            super().start(folder)
            if len(self.starts) == 1:
                self._running[folder].kill()

    engine = Dying(1)
    assert run_study(workspace, engine, most=1).done == 1
    assert len(engine.starts) == 2
    assert [failure.kind for failure in workspace.failures()] == ["signal 9"]


class Pretending(Counting):
    """Writes the results of cells without running them; then their process dies."""

    def start(self, folder: Path) -> None:
        self.starts.append(folder.name)
        told = json.loads((folder / CELL).read_text())
        cell = Cell(told["phase"], told["settings"], tuple(told["measure"]), told["name"], told["title"])
        of = (told["key"], cell.phase, setting_of(cell), cell.config.learning_rate, cell.config.seed)
        record = Record(*of, "accuracy", False, 3, 3, 0.5, 60, 20, True)
        (folder / DONE).write_text(json.dumps({"records": [record.as_json()]}))
        self.folder = folder

    def ended(self, seconds: float) -> dict[Path, int]:
        return {self.folder: -11}


def test_a_cell_whose_process_dies_after_its_results_is_done(asked, tmp_path):
    engine, workspace = Pretending(1), begin(tmp_path / "s", asked)
    assert run_study(workspace, engine).done == len(set(engine.starts)) == len(engine.starts) == 4
    assert workspace.failures() == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_a_cells_memory_is_not_that_of_the_process_which_started_it(tiny, tmp_path):
    workspace = begin(tmp_path / "s", of_mapping(grid(tiny, tmp_path, methods=["pafi"], seeds=[1]), "grid"))
    much = bytearray(b"x") * (2 << 30)
    run_study(workspace, Counting(1))
    assert workspace.records()[-1].more["peak_bytes"] < len(much)


def test_a_method_that_is_renamed_keeps_its_runs_in_one_row(asked, tmp_path):
    run_study(begin(tmp_path / "s", asked), Pretending(1))
    named = begin(tmp_path / "s", dataclasses.replace(asked, methods=({"method": "id3", "name": "ours"},)))
    assert [record.setting.method for record in named.records()] == ["ours"] * 4


def test_a_task_that_is_renamed_keeps_its_runs_in_one_column(asked, tmp_path):
    """Also in the report; and what was measured beside it keeps its own name."""
    plain = dataclasses.replace(asked, search=None, measure=("glue/rte",))

    class Measuring(Pretending):
        def start(self, folder: Path) -> None:
            super().start(folder)
            told = json.loads((folder / DONE).read_text())
            (record,) = told["records"]
            told["records"].append({**record, "setting": {**record["setting"], "task": "glue/rte"}})
            (folder / DONE).write_text(json.dumps(told))

    run_study(begin(tmp_path / "s", dataclasses.replace(plain, seeds=(1,))), Measuring(1))
    (task,) = plain.tasks
    named = dataclasses.replace(plain, tasks=({**task, "name": "questions"},))
    run_study(begin(tmp_path / "s", named), Measuring(1))
    told = [(record.setting.task, record.seed) for record in Workspace(tmp_path / "s").records()]
    assert told == [("questions", 1), ("glue/rte", 1), ("questions", 2), ("glue/rte", 2)]
    (board,) = content(gather(tmp_path / "s")).boards
    assert board.tasks == ("questions", "glue/rte")
    assert [len(result.runs) for task in board.tasks for _, result in board.of(task)] == [2, 2]


def test_a_stop_leaves_checkpoints_that_the_next_run_goes_on_from(tiny, tmp_path):
    settings = {"max_steps": 4000, "batch_size": 4, "eval_every": 10000, "save_every": 20, "keep": 1}
    asked = of_mapping(grid(tiny, tmp_path, methods=["pafi"], seeds=[1], settings=settings), "grid")
    workspace, stop = begin(tmp_path / "s", asked), Stop()

    class Stopping(Counting):
        def ended(self, seconds: float):
            if checkpoints(workspace.folder(self.starts[0])):
                stop.ask(signal.SIGTERM)
            return super().ended(0.2)

    with pytest.raises(StoppedError, match="goes on from here"):
        run_study(workspace, Stopping(1), stop=stop)
    assert workspace.records() == []
    (cell,) = workspace.left().ready
    (saved,) = checkpoints(workspace.folder(cell.key))
    step = int(saved.name.partition("-")[2])
    assert step >= 20
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == step


def test_two_runners_in_one_folder(asked, tmp_path):
    workspace = begin(tmp_path / "s", asked)
    told = (tmp_path / "s" / STUDY).read_bytes()
    with own(tmp_path / "s", "other"):
        with pytest.raises(RunFolderError, match="in use"):
            run_study(workspace, Counting(1))
        with pytest.raises(RunFolderError, match="in use"):
            begin(tmp_path / "s", dataclasses.replace(asked, seeds=(7,)))
    assert (tmp_path / "s" / STUDY).read_bytes() == told


def test_a_folder_that_is_no_study_is_left_alone(asked, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StudyError, match="holds other files"):
        begin(tmp_path, asked)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(StudyError, match="holds no study"):
        Workspace(tmp_path)


def test_the_commands_say_what_is_there(whole, tmp_path):
    shown = call("study", "show", whole).stdout
    assert shown.splitlines()[0].split() == ["method", "train.jsonl"]
    assert "id3 60" in shown
    assert "±" in shown
    assert json.loads(call("study", "status", whole, "--json").stdout)["done"] == 4
    assert "about" in call("study", "plan", whole, "--out", whole).stdout
    for kind in ("parquet", "csv", "jsonl"):
        assert "8 results" in call("study", "export", whole, "--out", tmp_path / f"r.{kind}").stdout
    import pandas

    frames = [pandas.read_parquet(tmp_path / "r.parquet"), pandas.read_csv(tmp_path / "r.csv")]
    for frame in frames:
        assert frame["value"].tolist() == [r.value for r in Workspace(whole).records()]
    assert ".parquet, .csv, .jsonl" in call("study", "export", whole, "--out", tmp_path / "r.txt", code=2).stderr


def test_a_study_of_own_rows_in_one_line(tiny, tmp_path):
    task = rows(tmp_path)
    line = ["compare", "--train", task["train"], "--validation", task["validation"], "--text", "q", "--label", "dog"]
    line += ["--methods", "pafi,random", "--model", tiny, "--budget", 60, "--seeds", 2, "--max-steps", 2, "--no-search"]
    found = call(*line, "--folder", tmp_path / "s", "--workers", 2, "--out", tmp_path / "t.md")
    assert "pafi" in (tmp_path / "t.md").read_text()
    assert "random" in found.stdout
    assert len(Workspace(tmp_path / "s").records()) == 4
    assert "at least two methods" in call("compare", "--task", "glue/rte", "--methods", "id3", code=2).stderr
    assert "or say what to run" in call("compare", code=2).stderr


def test_ray_gives_the_same_numbers(whole, asked, tmp_path):
    """Ray is started here, of one machine."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'selectune[ray]'")
    import ray

    from selectune.study.engines import Ray

    rate = Workspace(whole).records()[-1].lr
    fixed = dataclasses.replace(asked, search=None, settings={**asked.settings, "lr": rate})
    engine = Ray(None, 2)
    try:
        run_study(begin(tmp_path / "s", fixed), engine)
    finally:
        ray.shutdown()
    found = numbers(tmp_path / "s")
    assert len(found) == 4
    assert found.items() < numbers(whole).items()
    told = json.loads(next((tmp_path / "s" / "cells").glob(f"*/{CELL}")).read_text())
    assert set(told) == {"key", "phase", "settings", "measure", "name", "title"}
