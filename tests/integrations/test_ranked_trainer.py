"""transformers' Trainer in two processes: the delta of one process, and a resumed run with the bits of a whole one.

torchrun starts the whole run and accelerate the resumed one, so the two launchers are held against each other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch_kit import TORCHRUN, accelerated

import selectune as st
from selectune.files import seal

SCRIPT = str(Path(__file__).with_name("ranked_trainer.py"))


def launch(*words: object) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(*TORCHRUN, SCRIPT, folder, 4)
    return folder


def test_two_processes_give_the_delta_of_one(two, tmp_path):
    launch(SCRIPT, tmp_path, 8)
    one, both = st.load(tmp_path), st.load(two)
    assert one.selected == 60
    assert {name: flat.tolist() for name, flat in one.support.items()} == {
        name: flat.tolist() for name, flat in both.support.items()
    }
    for mine, theirs in zip(one.patches, both.patches, strict=True):
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-9, atol=1e-12)
    assert sorted(path.name for path in two.iterdir()) == ["checkpoint-3", "checkpoint-6", "delta.safetensors"]


def test_a_resumed_run_of_two_processes_has_the_bits_of_a_whole_one(two, tmp_path):
    shutil.copytree(two / "checkpoint-3", tmp_path / "checkpoint-3")
    launch(*accelerated(), SCRIPT, tmp_path, 4, "resume")
    assert (tmp_path / "delta.safetensors").read_bytes() == (two / "delta.safetensors").read_bytes()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    launch(*TORCHRUN, SCRIPT, folder, 4, "sharded")
    return folder


def test_weights_that_the_trainer_shards_train_as_replicated_ones(two, sharded):
    for file in ("delta", "checkpoint-3/delta", "checkpoint-3/tuner", "checkpoint-3/model"):
        mine, theirs = ((folder / f"{file}.safetensors").read_bytes() for folder in (sharded, two))
        assert mine == theirs, file


def test_a_resumed_run_of_sharded_weights_has_the_bits_of_a_whole_one(sharded, tmp_path):
    shutil.copytree(sharded / "checkpoint-3", tmp_path / "checkpoint-3")
    launch(*TORCHRUN, SCRIPT, tmp_path, 4, "sharded", "resume")
    assert (tmp_path / "delta.safetensors").read_bytes() == (sharded / "delta.safetensors").read_bytes()


def test_weights_that_were_changed_are_refused_where_they_are_sharded(sharded, tmp_path):
    folder = shutil.copytree(sharded / "checkpoint-3", tmp_path / "checkpoint-3")
    weights = torch.load(folder / "pytorch_model_fsdp.bin", weights_only=True)
    weights["bert.pooler.dense.weight"][1, 1] += 1
    torch.save(weights, folder / "pytorch_model_fsdp.bin")
    seal(folder, {"step": 3})
    with pytest.raises(AssertionError, match=r"outside the support: bert\.pooler\.dense\.weight"):
        launch(*TORCHRUN, SCRIPT, tmp_path, 4, "sharded", "resume")
