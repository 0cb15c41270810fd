"""`selectune train` in two processes: one folder, one delta, and a resumed run with the same bits.

torchrun starts the whole run, and accelerate the resumed one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from launch_kit import TORCHRUN, accelerated

import selectune as st
from selectune.runs import resume
from selectune.runs.folder import run_folder

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def train(tiny, data, tmp_path):
    """Without dropout, whose draws would differ between one process and two."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text("utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config), "utf-8")

    def run(launcher, out, *more):
        words = ("train", "--model", model, "--task", "glue/rte", "--data", data, "--budget", "60")
        batch = () if "--batch-size" in more else ("--batch-size", 4)
        settings = ("--max-steps", 4, *batch, "--lr", "1e-2", "--save-every", 2, "--out", out, "--json")
        done = subprocess.run(
            [sys.executable, *map(str, (*launcher, "-m", "selectune", *words, *settings, *more))],
            capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise ChildProcessError(done.stderr)
        return json.loads(done.stdout)  # one process talks

    return run


def test_two_processes_train_one_delta(train, tmp_path):
    whole = train(TORCHRUN, tmp_path / "whole")
    there = sorted(path.name for path in (tmp_path / "whole").iterdir() if not path.name.startswith("."))
    assert there == ["checkpoint-2", "checkpoint-4", "delta.safetensors", "run.json"]
    assert (whole["selected"], whole["steps"], st.load(tmp_path / "whole").selected) == (60, 4, 60)

    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    resumed = train(accelerated(), tmp_path / "half", "--resume")
    assert (resumed["resumed"], resumed["value"]) == (2, whole["value"])
    delta = [(tmp_path / name / "delta.safetensors").read_bytes() for name in ("whole", "half")]
    assert delta[0] == delta[1]

    # one process goes on with all of the rows of a step, and not with half of them
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "one" / "checkpoint-2")
    with pytest.raises(ChildProcessError, match=r"other settings: processes \(2 there, None now\)"):
        train((), tmp_path / "one", "--resume")
    alone = train((), tmp_path / "one", "--resume", "--batch-size", 8)
    assert (alone["resumed"], alone["steps"], alone["selected"]) == (2, 4, 60)
    ours, theirs = st.load(tmp_path / "one"), st.load(tmp_path / "whole")
    assert {n: f.tolist() for n, f in ours.support.items()} == {n: f.tolist() for n, f in theirs.support.items()}
    for mine, other in zip(ours.patches, theirs.patches, strict=True):
        torch.testing.assert_close(mine.values, other.values, rtol=1e-3, atol=1e-5)


def test_a_rank_alone_in_its_world_owns_its_folder(tmp_path, monkeypatch):
    """Other launchers set RANK too; only a process beside a first one leaves the files to that one."""
    monkeypatch.setenv("RANK", "3")
    for size, shared in (("1", False), ("4", True)):
        monkeypatch.setenv("WORLD_SIZE", size)
        with run_folder(tmp_path / size) as folder:
            assert folder.shared is shared


def test_rows_of_similar_length_are_other_rows_in_another_number_of_processes():
    for grouped in (False, True):
        two, one = {"batch_size": 4, "processes": 2}, {"batch_size": 8}
        same = resume._compared({**two, "group_by_length": grouped}) == resume._compared(
            {**one, "group_by_length": grouped}
        )
        assert same is not grouped
