"""What a report says: numbers as scipy has them, and a sentence for everything that is missing or broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_kit import delta, history, run_json, study
from scipy import stats
from typer.testing import CliRunner

from selectune.cli.app import app
from selectune.errors import ConfigError, StudyError
from selectune.study.records import Record, Setting, line_of
from selectune.study.report import FORMATS, content, gather
from selectune.study.report.heat import heat_map
from selectune.study.report.shown import thin

METHODS = ("full", "id3", "random")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, study(folder, METHODS, seeds=3, steps=12)


@pytest.fixture
def folder(made, tmp_path):
    """A study of its own to spoil."""
    return shutil.copytree(made[0], tmp_path / "study")


def last_values(records, method, task):
    return [r.value for r in records if r.last and (r.setting.method, r.setting.task) == (method, task)]


def test_scores_and_differences_are_those_of_the_records(made):
    shown = content(gather(made[0]))
    (board,) = shown.boards
    assert board.tasks == ("glue/stsb", "trec")
    assert [line.label for line in board.lines] == ["full", "id3", "random"]
    for line in board.lines:
        for task in board.tasks:
            found, values = line.results[task], last_values(made[1], line.label, task)
            assert found.score.mean == pytest.approx(sum(values) / 3)
            assert found.score.sd == pytest.approx(stats.tstd(values))
            if line.label == "full":
                assert found.apart is None
                continue
            test = stats.ttest_rel(values, last_values(made[1], "full", task))
            ends = test.confidence_interval(0.95)
            assert (found.apart.low, found.apart.high) == pytest.approx((ends.low, ends.high))
    assert len(shown.answer) == 3
    assert "accuracy 0.8" in shown.answer[0]
    assert "(id3)" in shown.answer[1]
    assert "Of 4 differences" in shown.answer[2]
    assert "with Holm's correction, none can" in shown.answer[2]
    assert any("So few runs that differ can give no p below 0.25" in note for note in shown.notes)


def test_every_run_has_its_id_and_a_command_that_names_its_settings(made):
    shown = content(gather(made[0]))
    runs = [run for line in shown.boards[0].lines for found in line.results.values() for run in found.runs]
    assert len(runs) == 18
    for run in runs:
        words = run.command.split()
        assert words[:3] == ["selectune", "train", "--config"]
        assert json.loads(Path(words[3]).read_text())["run"] == run.run


def test_a_reference_can_be_chosen_and_an_unknown_one_is_told(made):
    shown = content(gather(made[0]), "id3")
    assert [line.label for line in shown.boards[0].lines if line.reference] == ["id3"]
    assert shown.command.endswith("--against id3")
    with pytest.raises(ConfigError, match=r"no method 'idd3'. They have: full, id3, random. Did you mean id3"):
        content(gather(made[0]), "idd3")


def test_a_cut_line_is_noted_and_a_missing_cell_named(folder):
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    gone = [line for line in lines if not ('"random"' in line and '"trec"' in line)]
    (folder / "results.jsonl").write_text("".join(gone[:-1]) + gone[-1][:50])
    shown = content(gather(folder))
    said = " ".join(shown.notes)
    assert "The last line of results.jsonl was cut off" in said
    assert "No run is finished of random on trec." in said
    assert "4 cells are not finished" in said
    assert "unequal numbers of runs. Missing seeds: " in said
    for write in FORMATS.values():
        assert "random" in write(shown)


def test_search_runs_are_counted_apart(folder, made):
    trial = next(r for r in made[1] if r.last)
    told = [
        Record.of_json({**trial.as_json(), "phase": "search", "cell": f"s{i}", "lr": i, "value": 0.0}) for i in (1, 2)
    ]
    with open(folder / "results.jsonl", "a") as file:
        file.writelines(map(line_of, told))
    shown = content(gather(folder))
    assert [line.results["trec"].score.runs for line in shown.boards[0].lines] == [3, 3, 3]
    assert any("searched with 2 trial runs" in note for note in shown.notes)
    assert not any("not finished" in note for note in shown.notes)  # their folders are not needed


def test_a_study_without_a_finished_run_and_a_folder_of_something_else(folder, tmp_path):
    (folder / "results.jsonl").unlink()
    with pytest.raises(StudyError, match="has no finished run that counts yet: 18 cells have begun"):
        gather(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match="neither a study nor a finished run"):
        gather(tmp_path / "empty")
    with pytest.raises(StudyError, match="is no folder"):
        gather(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change", [{"value": "high"}, {"step": None}, {"cell": "../../etc"}, {"metric": 3}, {"more": [1]}], ids=str
)
def test_a_record_of_the_wrong_kind_is_a_sentence(folder, made, change):
    told = {**made[1][0].as_json(), "cell": "another", **change}
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps(told) + "\n")
    with pytest.raises(StudyError, match=r"results.jsonl"):
        gather(folder)


def single(folder, **more):
    setting = Setting("demo", "glue/rte", "id3", None, 0.0017)
    told = {"metric": "accuracy", "lowest": False, "steps": 10, "value": 0.75, "selected": 400, "examples": 100}
    more = {"seconds": 71.0, "delta_bytes": 2000, "run": "ab12"} | more
    record = Record("x", "main", setting, lr=5e-4, seed=1, step=10, last=True, **told, more=more)
    log = [{"step": 5, "metric": 0.5, "selected": 200}, *history(10, 400, 0.4)]
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(run_json(record, log))
    return folder


def test_a_single_run_has_the_same_page(tmp_path):
    run = single(tmp_path / "run")
    delta(3).save(run)
    shown = content(gather(run))
    (found,) = shown.boards[0].lines[0].results.values()
    assert found.lines["metric"] == (((5, 0.5), (10, 0.75)),)
    assert len(found.lines["loss"][0]) == 10
    ends = stats.binomtest(75, 100).proportion_ci(0.95, "wilson")
    assert f"interval over rows [{ends.low:.3f},\xa0{ends.high:.3f}]" in shown.answer[0]
    assert found.runs[0].command == f"selectune train --config {run}/run.json --out again/run"
    (run / "run.json").write_text('{"value": 1}')
    with pytest.raises(StudyError, match=r"run.json is not the record of a finished run: KeyError at 'config'"):
        gather(run)


def test_a_heat_map_counts_every_scalar_and_knows_when_the_first_was_chosen(tmp_path):
    made = delta(3)
    made.save(tmp_path)
    log = history(10, made.selected, 0.4)
    found = heat_map(tmp_path, "id3", "", log)
    assert found.total == made.selected
    assert found.layers == ("0", "1", "2", "3", "4", "5")
    spots = {spot.name: spot for row in found.rows.values() for spot in row if spot} | {
        s.name: s for s in found.outside
    }
    assert {name: spot.count for name, spot in spots.items()} == {p.name: p.indices.numel() for p in made.patches}
    for patch in made.patches:
        rank = int(patch.order.min())
        after = next(entry["step"] for entry in log if entry["selected"] > rank)
        assert (spots[patch.name].first, spots[patch.name].step) == (rank, after)
    delta(3, order=False).save(tmp_path)
    assert not heat_map(tmp_path, "id3", "", log).ordered
    (tmp_path / "delta.safetensors").write_bytes(b"\0" * 100)
    assert "cannot be read" in heat_map(tmp_path, "id3", "", log).why
    assert "There is no delta" in heat_map(tmp_path / "none", "id3", "", log).why


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=200), st.integers(2, 40))
def test_a_thinned_line_keeps_its_ends_or_its_pieces(values, most):
    line = list(enumerate(values))
    kept, pieces = thin(line, most), thin(line, most, mean=True)
    assert len(kept) == len(pieces) == min(len(line), most)
    assert (kept[0], kept[-1]) == (line[0], line[-1])
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for _, value in pieces)


def test_the_command_writes_each_format(folder, tmp_path):
    call = CliRunner().invoke
    found = call(app, ["report", str(folder)])
    assert found.exit_code == 0, found.output
    assert (folder / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert call(app, ["report", str(folder), "--format", "tex", "--out", "-"]).stdout.startswith("% Made by selectune")
    told = json.loads(
        call(app, ["report", str(folder), "--format", "md", "--out", str(tmp_path / "a.md"), "--json"]).stdout
    )
    assert told["bytes"] == (tmp_path / "a.md").stat().st_size
    for args, code, why in (
        (["--format", "pdf"], 2, "there is no such format"),
        (["--out", str(tmp_path / "no" / "a.html")], 2, "does not exist"),
        (["--against", "nothing"], 2, "no method 'nothing'"),
    ):
        refused = call(app, ["report", str(folder), *args])
        assert (refused.exit_code, why in refused.stderr) == (code, True), refused.output
    assert call(app, ["report", str(tmp_path / "nowhere")]).exit_code == 1
