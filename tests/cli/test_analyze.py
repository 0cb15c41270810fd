"""`selectune analyze` and `check` end to end: on runs of a tiny model, and on what cannot be analysed."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from cli_kit import call

import selectune as st
from selectune.delta import Delta, base_info
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.study.analysis import figures
from selectune.study.analysis.subjects import read_subjects

pytest_plugins = ("tiny_fixtures",)

RUNS = {
    "id3": {"method": "id3", "budget": 200, "checkpoint_budgets": (30, 60, 150), "eval_every": 2},
    "random": {"method": "random", "budget": 200},
    "repeat": {"method": "repeat-d3", "budget": 60, "save_every": 2},
    "full": {"method": "full", "lr": 5e-4},
}


@pytest.fixture(scope="module")
def runs(tiny, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for name, more in RUNS.items():
        common = {"model": str(tiny), "task": "glue/rte", "max_steps": 6, "lr": 5e-3, "data": str(data), "seed": 1}
        run(RunConfig(**{**common, **more}, out=str(out / name)))
    return out


def analysed(*args, **more):
    return json.loads(call("analyze", *args, "--json", **more).stdout)


def test_one_run_with_figures_and_their_numbers(runs, tmp_path):
    told = call("analyze", runs / "id3", "--full", runs / "full", "--out", tmp_path / "figures").stdout
    assert told.startswith("id3: id3 on glue/rte, 200 of ")
    for line in ("entropy", "lie in", "densest", "at steps 0 to 5, half of them by step 2", "rho", "7 figures with"):
        assert line in told
    assert "gradients   698, 0.5817 of the 1,200 that a static mask gives; (T + 1) B / 2 is 700.0" in told
    kinds = ("against-full", "allocation", "entropy", "magnitudes", "metric", "sparsity", "timing")
    found = {path.name for path in (tmp_path / "figures").iterdir()}
    assert found == {f"{kind}.{form}" for kind in kinds for form in ("json", "png", "svg")}
    assert (tmp_path / "figures" / "timing.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "figures" / "sparsity.json").read_text())["data"]
    assert data["steps"] == [0, 1, 2, 3, 4, 5, 6]
    assert data["tensor_sparsity"][0] == 1
    assert data["tensor_sparsity"] == sorted(data["tensor_sparsity"], reverse=True)
    assert data["normalised"][0] is None


def test_the_numbers_are_those_of_the_deltas_on_the_way(runs):
    found = analysed(runs / "id3")["runs"]["id3"]
    assert found["left_out"] == {}
    at = dict(zip(found["series"]["steps"], found["series"]["untouched"], strict=True))
    for budget, step in ((30, 1), (60, 2), (150, 5)):
        there = st.load(runs / "id3" / f"budget-{budget}")
        assert at[step] == found["tensors"] - len(there.patches)
    heat = found["allocation"]
    assert (heat["start"]["total"], heat["end"]["total"]) == (33, 200)
    assert sum(row["selected"] for row in found["share"].values()) == 200
    assert found["timing"]["histogram"] == {"steps": [0, 1, 2, 3, 4, 5], "selected": [33, 33, 34, 33, 33, 34]}
    points = [(p["step"], p["selected"]) for p in found["metric"]["points"]]
    assert points == [(1, 33), (2, 66), (4, 133), (5, 166), (6, 200)]


def test_several_runs_and_what_they_share(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FORMATS", ("svg",))
    found = analysed(runs / "id3", runs / "random", runs / "repeat", "--out", tmp_path)
    assert found["overlaps"]["names"] == ["id3", "random", "repeat"]
    assert len(found["overlaps"]["pairs"]) == 3
    pair = found["overlaps"]["pairs"][0]
    same = st.algebra.overlap(st.load(runs / "id3"), st.load(runs / "random"))
    assert (pair["shared"], pair["jaccard"]) == (same.shared, same.jaccard)
    assert 0 < pair["chance"]["overlap"] < 0.1
    assert (tmp_path / "random" / "allocation.svg").is_file()
    assert (tmp_path / "overlap.json").is_file()
    static = found["runs"]["random"]
    assert static["updates"]["ratio"] == 1
    assert static["series"]["of"] == "the one selection"
    repeat = found["runs"]["repeat"]
    assert repeat["series"]["of"] == "the deltas on the way, cumulative"
    assert repeat["series"]["steps"] == [0, 2, 4, 6]
    assert repeat["series"]["untouched"] == sorted(repeat["series"]["untouched"], reverse=True)
    assert "timing" in repeat["left_out"]
    assert "by chance" in call("analyze", runs / "id3", runs / "random").stdout


def test_a_delta_by_itself_and_its_base_named(runs, tiny, tmp_path):
    alone = tmp_path / "alone.safetensors"
    shutil.copy(runs / "id3" / "budget-60" / "delta.safetensors", alone)
    found = analysed(alone, "--model", tiny)["runs"]["alone"]
    assert found["selected"] == 66
    assert found["metric"] is None


def test_what_cannot_be_analysed(runs, other, tiny, tmp_path):
    def refused(*args, code=2):
        return json.loads(call("analyze", *args, "--json", code=code).stdout)["error"]["message"]

    assert "it trains" in refused(runs / "full")
    assert "--full" in refused(runs / "full")
    assert "no run of full fine-tuning" in refused(runs / "id3", "--full", runs / "random")
    assert "base" in refused(runs / "id3", "--model", other, code=1)
    assert "named twice" in refused(runs / "id3", runs / "id3", code=1)
    assert "holds no delta.safetensors" in refused(tmp_path, code=1)
    empty = Delta([], [], {"base": base_info(torch.nn.Linear(2, 2))}).save(tmp_path / "empty.safetensors")
    assert "it is empty" in refused(empty, "--model", tiny)
    harmed = tmp_path / "harmed"
    shutil.copytree(runs / "random", harmed)
    for text in ("[]", '{"checkpoints": [{}]}', '{"history": [{"metric": "x", "step": 1, "selected": 1}]}', "{"):
        (harmed / "run.json").write_text(text)
        assert "run.json" in refused(harmed, code=1)


def test_figures_need_matplotlib_and_the_summary_does_not(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    why = call("analyze", runs / "random", "-o", tmp_path / "out", code=2).stderr
    assert "pip install 'selectune[plot]'" in why
    assert call("analyze", runs / "random").stdout.startswith("random: random")


def test_names_of_runs_differ(tmp_path, runs):
    for folder in ("a", "b"):
        shutil.copytree(runs / "random", tmp_path / folder / "run")
    assert [s.name for s in read_subjects([tmp_path / "a" / "run", tmp_path / "b" / "run"])] == ["a-run", "b-run"]


def test_check_theorem():
    told = call("check", "theorem", "--seeds", 2).stdout
    assert told.startswith("0 violations among 144 scalars")
    assert "H = 2 > 1" in told
    assert json.loads(call("check", "theorem", "--seeds", 2, "--json").stdout)["violations"] == 0
