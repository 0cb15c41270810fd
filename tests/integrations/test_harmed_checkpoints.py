"""Checkpoints of the Trainer that were harmed: the newest whole one is taken, or an error says that there is none."""

from __future__ import annotations

import pytest
from test_resume import Runs
from trainer_kit import STEPS

import selectune as st
from selectune.delta import weights_digest
from selectune.errors import CheckpointError
from selectune.integrations.checkpoints import newest_checkpoint
from selectune.models.bases import quiet

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def runs(tiny, data, tmp_path):
    return Runs(tiny, data, tmp_path)


@pytest.fixture
def stopped(runs):
    """The folder of checkpoint 4 of a run of ID3."""
    runs.stopped_after(4, lambda: st.id3(60, STEPS))
    return runs.folder / "checkpoint-4"


HARMS = {
    "optimizer.pt": lambda path: path.write_bytes(b""),
    "scheduler.pt": lambda path: path.unlink(),
    "rng_state.pth": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:]),
    "trainer_state.json": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "model.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "manifest.json": lambda path: path.unlink(),
    "delta.safetensors": lambda path: path.write_bytes((path.parents[1] / "checkpoint-2" / path.name).read_bytes()),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_harmed_checkpoint_is_passed_over(runs, stopped, tmp_path, caplog, name):
    straight, whole = runs.trainer(lambda: st.id3(60, STEPS), folder=tmp_path / "straight")
    with quiet():
        straight.train()
    HARMS[name](stopped / name)
    trainer, tuner = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet(), pytest.raises(CheckpointError, match=r"checkpoint-4 is (damaged|incomplete)"):
        trainer.train(resume_from_checkpoint=str(stopped))
    assert weights_digest(trainer.model) == runs.base
    with quiet():
        trainer.train(resume_from_checkpoint=True)
    assert "Passed over: " in caplog.text
    assert "checkpoint-4" in caplog.text
    assert tuner.delta().to_bytes() == whole.delta().to_bytes()


def test_where_no_checkpoint_is_whole(runs, stopped):
    for folder in runs.folder.iterdir():
        (folder / "optimizer.pt").write_bytes(b"")
    trainer, _ = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet(), pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole.*optimizer\.pt has 0 bytes"):
        trainer.train(resume_from_checkpoint=True)
    assert newest_checkpoint(runs.folder / "nowhere") is None
