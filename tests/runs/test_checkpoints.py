"""Damaged checkpoints: the newest intact one is taken, or an error says why not. Folders with two owners."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil

import pytest
import torch

import selectune as st
from selectune.delta import DELTA_FILE
from selectune.errors import CheckpointError, ConfigError, RunFolderError, SelectuneError, StoppedError
from selectune.files import seal
from selectune.runs import folder as folders
from selectune.runs import resume, training
from selectune.runs.config import RunConfig
from selectune.runs.progress import RunCallback
from selectune.runs.stop import Stop
from selectune.runs.training import run

pytest_plugins = ("tiny_fixtures",)

TRIALS = int(os.environ.get("TRIALS", "24"))  # 100 in the long form; each is a run
NAMES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "tuner.safetensors", "run.json",
         "delta.safetensors", "manifest.json")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, data):
    """A finished run with checkpoints at 2, 4 and 5, its settings and its delta."""
    where = tmp_path_factory.mktemp("made")
    config = RunConfig(
        model=str(tiny), task="glue/rte", budget=120, max_steps=5, batch_size=8, lr=5e-3,
        data=str(data), out=str(where / "out"), seed=1, save_every=2, eval_every=50,
    )  # fmt: skip
    return config, run(config).delta.read_bytes()


def flip(path, rng):
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) * 8)
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def swap(path, rng):
    other = path.parent / rng.choice([name for name in NAMES if name != path.name])
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


HARMS = {
    "empty": lambda path, rng: path.write_bytes(b""),
    "cut": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "gone": lambda path, rng: path.unlink(),
    "flip": flip,
    "two flips": lambda path, rng: (flip(path, rng), flip(path, rng)),
    "swap": swap,
    "of step 2": lambda path, rng: shutil.copy(path.parents[1] / "checkpoint-2" / path.name, path),
    "grow": lambda path, rng: path.write_bytes(path.read_bytes() + b"x"),
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
    "zeros": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
    "folder": lambda path, rng: (path.unlink(), path.mkdir()),
    "all gone": lambda path, rng: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_harmed_checkpoint(made, tmp_path, caplog, trial):
    config, whole = made
    rng = random.Random(trial)
    out = tmp_path / "out"
    shutil.copytree(config.out, out)
    for name in folders.RESULTS:
        (out / name).unlink()
    kind = list(HARMS)[trial % len(HARMS)]
    harmed = ["checkpoint-5", "checkpoint-4"][: 1 + trial % 2]
    for name in harmed:
        HARMS[kind](out / name / NAMES[rng.randrange(len(NAMES))], rng)
    caplog.set_level(logging.WARNING, "selectune")
    found = run(dataclasses.replace(config, out=str(out)), resume=True)
    assert found.delta.read_bytes() == whole
    assert found.resumed == (4 if len(harmed) == 1 else 2)
    assert [name in caplog.text for name in harmed] == [kind != "all gone"] * len(harmed)
    assert not list(out.rglob("*.tmp"))


def test_the_names_of_results_are_those_that_are_written():
    """The folder's rules need no torch, so they spell the delta's name themselves."""
    assert folders.RESULTS == (resume.RUN_FILE, DELTA_FILE)


def test_where_none_is_whole(made, tmp_path):
    config, _ = made
    out = tmp_path / "out"
    shutil.copytree(config.out, out)
    for folder in folders.checkpoints(out):
        flip(folder / "optimizer.pt", random.Random(0))
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole.*point-5 .*point-4 .*point-2 "):
        run(dataclasses.replace(config, out=str(out)), resume=True)


def _mutated(told, rng):
    """A run.json with one thing in it changed."""
    keys, values = list(told), [None, True, -1, 10**400, 1e308, "", "x" * 5000, [], {}, [[]], {"step": 1}, float("nan")]
    key = rng.choice(keys)
    kind = rng.randrange(5)
    if kind == 0:
        del told[key]
    elif kind == 1:
        told[rng.choice(["more", "", "Step"])] = 1
    elif kind == 2:
        told["history"] = [rng.choice([*values, {"step": "1"}, {"loss": 1.0}])]
    elif kind == 3:
        told["settings"] = {**told["settings"], rng.choice(list(told["settings"])): rng.choice(values)}
    else:
        told[key] = rng.choice(values)
    return told


def test_mutants_of_a_run_json(made, tmp_path, tries):
    """The manifest is written again, so later checks are reached: an error of ours, or a harmless change."""
    config, _ = made
    folder = tmp_path / "out" / "checkpoint-4"
    shutil.copytree(f"{config.out}/checkpoint-4", folder)
    whole = (folder / "run.json").read_text()
    expected = resume.read(folder)
    taken = 0
    tries(500)
    for trial in range(500):
        rng = random.Random(trial)
        text = json.dumps(_mutated(json.loads(whole), rng))
        if trial % 5 == 0:
            data = bytearray(whole.encode())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            text = data.decode("latin-1")
        (folder / "run.json").write_text(text, encoding="latin-1" if trial % 5 == 0 else "utf-8")
        seal(folder, {"run": expected.run, "step": 4})
        try:
            found = resume.find(config, folder)
        except (CheckpointError, ConfigError) as error:
            assert "checkpoint-4" in str(error)  # noqa: PT017
        else:
            assert (found.step, found.settings) == (expected.step, expected.settings)
            taken += 1
    assert 0 < taken < 100


def test_a_checkpoint_is_small_and_has_no_model(made):
    config, _ = made
    newest = folders.checkpoints(folders.Path(config.out))[0]
    size = sum(path.stat().st_size for path in newest.iterdir())
    assert size < 60 * 120 + (1 << 16)
    assert not (newest / "model.safetensors").exists()


def test_full_checkpoints_have_the_model(made, tmp_path):
    config, whole = made
    full = dataclasses.replace(config, out=str(tmp_path / "full"), full_checkpoints=True)
    assert run(full).delta.read_bytes() == whole
    assert (tmp_path / "full/checkpoint-2/model.safetensors").is_file()
    rest = dataclasses.replace(config, out=str(tmp_path / "rest"))
    assert run(rest, resume=tmp_path / "full/checkpoint-2").delta.read_bytes() == whole


def test_the_newest_are_kept(made, tmp_path):
    config, _ = made
    run(dataclasses.replace(config, out=str(tmp_path / "out"), keep=1))
    assert [path.name for path in folders.checkpoints(tmp_path / "out")] == ["checkpoint-5"]
    with pytest.raises(ConfigError, match="keep=0"):
        dataclasses.replace(config, keep=0)
    with pytest.raises(ConfigError, match="keep=2 needs save_every"):
        dataclasses.replace(config, keep=2, save_every=None)


def test_a_run_is_not_overwritten_without_a_word(made, tmp_path):
    config, whole = made
    out = tmp_path / "out"
    shutil.copytree(config.out, out)
    again = dataclasses.replace(config, out=str(out), seed=2)
    with pytest.raises(RunFolderError, match=r"holds run\.json and delta\.safetensors of an earlier run.*--overwrite"):
        run(again)
    with pytest.raises(ConfigError, match="one of the two"):
        run(again, resume=True, overwrite=True)
    with pytest.raises(ConfigError, match=r"is the folder of a run\. Its checkpoints, newest first: checkpoint-5"):
        run(again, resume=out)
    with pytest.raises(ConfigError, match=r"manifest\.json is no folder"):
        run(again, resume=out / "checkpoint-5" / "manifest.json")
    with pytest.raises(SelectuneError, match="does not exist"):  # refused later, so the earlier run is still there
        run(dataclasses.replace(again, model=str(tmp_path / "no-model")), overwrite=True)
    assert (out / "delta.safetensors").read_bytes() == whole
    (out / "notes.txt").write_text("of the user")
    (out / "checkpoint-9").mkdir()
    (out / "checkpoint-9" / "notes.txt").write_text("of the user")
    found = run(dataclasses.replace(again, save_every=None), overwrite=True)
    assert found.delta.read_bytes() != whole
    assert [path.name for path in folders.checkpoints(out)] == ["checkpoint-9"]
    assert (out / "notes.txt").exists()


def test_another_runs_results_are_not_overwritten_by_a_resumed_one(made, tmp_path):
    config, _ = made
    out = tmp_path / "out"
    out.mkdir()
    (out / "delta.safetensors").write_bytes(b"precious")
    with pytest.raises(RunFolderError, match="of an earlier run"):
        run(dataclasses.replace(config, out=str(out)), resume=f"{config.out}/checkpoint-2")
    assert (out / "delta.safetensors").read_bytes() == b"precious"


def test_room_is_looked_for_before_training(made, tmp_path, monkeypatch):
    config, _ = made
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(RunFolderError, match=r"has room for 1,000 bytes; .* may need"):
        run(dataclasses.replace(config, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_the_checkpoints_before(made, tmp_path, monkeypatch):
    config, whole = made
    save, calls = torch.save, []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) > 4:  # optimizer, scheduler and random state are three
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fails)
    out = dataclasses.replace(config, out=str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-4: .*unexpected pos.*Earlier checkpoints"):
        run(out)
    monkeypatch.undo()
    found = run(out, resume=True)
    assert (found.resumed, found.delta.read_bytes()) == (2, whole)


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_run_that_is_asked_to_stop(made, tmp_path, monkeypatch, step):
    """Between steps and in the middle of a measurement: the same delta and the same measurements in the end."""
    config, whole = made
    config = dataclasses.replace(config, out=str(tmp_path / "out"), eval_every=2, save_every=None)
    straight = run(dataclasses.replace(config, out=str(tmp_path / "straight")))
    original, stop = RunCallback.on_step_end, Stop()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            stop.ask(15)
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", on_step_end)
        with pytest.raises(StoppedError, match=rf"after step {step} of 5, as asked\. .*checkpoint-{step} has") as told:
            run(config, stop=stop)
    assert (told.value.step, told.value.signal, stop.listening) == (step, 15, False)
    assert not (tmp_path / "out" / "delta.safetensors").exists()
    rest = run(config, resume=True)
    assert rest.delta.read_bytes() == whole == straight.delta.read_bytes()
    measured = [[r for r in found.history if "metric" in r] for found in (rest, straight)]
    assert measured[0] == measured[1]
    assert [record["step"] for record in rest.history] == sorted(record["step"] for record in rest.history)


def test_a_measurement_that_is_broken_off_twice(made, tmp_path, monkeypatch):
    config, whole = made
    config = dataclasses.replace(config, out=str(tmp_path / "out"), eval_every=2, save_every=None)
    original, stop = RunCallback.on_step_end, Stop()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            stop.ask()
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", on_step_end)
        with pytest.raises(StoppedError, match="after step 2 of 5"):
            run(config, stop=stop)
    again = Stop()
    again.ask()
    with pytest.raises(StoppedError, match="after step 2 of 5"):
        run(config, resume=True, stop=again)
    rest = run(config, resume=True)
    assert [record["step"] for record in rest.history if "metric" in record] == [2, 4]
    assert rest.delta.read_bytes() == whole


def test_an_earlier_run_goes_only_when_the_new_one_can_be_stopped_in_order(made, tmp_path, monkeypatch):
    """A stop is requested while old files are removed. The new run has a checkpoint then, so a run is left."""
    config, _ = made
    shutil.copytree(config.out, tmp_path / "out")
    again, stop, begin = dataclasses.replace(config, out=str(tmp_path / "out"), seed=2), Stop(), folders.RunFolder.begin

    def asked(self, resumed):
        assert stop.listening
        begin(self, resumed)
        stop.ask()

    monkeypatch.setattr(folders.RunFolder, "begin", asked)
    with pytest.raises(StoppedError, match="after step 1 of 5"):
        run(again, overwrite=True, stop=stop)
    assert [path.name for path in folders.checkpoints(tmp_path / "out")] == ["checkpoint-1"]


def test_a_stop_while_the_delta_is_saved(made, tmp_path, monkeypatch):
    config, whole = made
    stop, save = Stop(), training._Run._save

    def asked(*args, **more):
        assert stop.listening
        stop.ask()
        return save(*args, **more)

    monkeypatch.setattr(training._Run, "_save", asked)
    with pytest.raises(StoppedError, match=r"after its last step: .* is whole"):
        run(dataclasses.replace(config, out=str(tmp_path / "out")), stop=stop)
    assert (tmp_path / "out/delta.safetensors").read_bytes() == whole


def test_a_resumed_run_has_its_own_interval(made, tmp_path):
    config, whole = made
    found = run(
        dataclasses.replace(config, out=str(tmp_path / "out"), save_every=1), resume=f"{config.out}/checkpoint-2"
    )
    assert found.delta.read_bytes() == whole
    assert [path.name for path in folders.checkpoints(tmp_path / "out")] == [
        "checkpoint-5",
        "checkpoint-4",
        "checkpoint-3",
    ]


def test_temporary_files_of_others_stay(made, tmp_path):
    config, _ = made
    name = f".delta.safetensors.{'0a' * 8}.tmp"
    for folder in (tmp_path / "out" / "below", tmp_path / "out"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (tmp_path / "out" / ".lock").write_text("of somebody else")
    run(dataclasses.replace(config, out=str(tmp_path / "out"), max_steps=1, save_every=None))
    assert not (tmp_path / "out" / name).exists()
    assert (tmp_path / "out" / "below" / name).exists()
    assert (tmp_path / "out" / ".lock").read_text() == "of somebody else"


def test_a_stop_after_the_last_step(made, tmp_path, monkeypatch):
    config, whole = made
    stop = Stop()
    monkeypatch.setattr(RunCallback, "on_train_end", lambda self, *a, **k: stop.ask(), raising=False)
    with pytest.raises(StoppedError, match=r"after its last step: .*delta\.safetensors is whole; it was not"):
        run(dataclasses.replace(config, out=str(tmp_path / "out")), stop=stop)
    assert (tmp_path / "out/delta.safetensors").read_bytes() == whole
    assert st.load(tmp_path / "out").selected == 120
