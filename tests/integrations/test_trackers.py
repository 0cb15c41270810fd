"""What trackers get: selected, budget and quota beside the Trainer's own numbers, whichever tracker it is."""

from __future__ import annotations

import struct

import pytest
from trainer_kit import STEPS, trainer_of

import selectune as st
from selectune import tasks
from selectune.integrations.transformers import SelectuneCallback
from selectune.models.bases import load_model, quiet

pytest_plugins = ("tiny_fixtures",)
RTE = tasks.get("glue/rte")


@pytest.fixture
def loaded(tiny):
    return load_model(str(tiny), RTE.head, 0)


@pytest.fixture
def rows(loaded, data):
    return RTE.encode(loaded.tokenizer, tasks.load(RTE, "train", data).examples, 32)


def scalars(folder):
    """{tag: [(step, value)]} of the only events file below a folder, read record by record."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="tensorboardX is not installed")
    (file,) = folder.rglob("events.out.tfevents.*")
    content, at, found = file.read_bytes(), 0, {}
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.mark.parametrize("late", [False, True], ids=["at construction", "added later"])
def test_an_events_file_holds_the_counts(loaded, rows, tmp_path, late):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    tuner = st.attach(loaded.model, st.id3(budget=60, steps=STEPS))
    callback = SelectuneCallback(tuner)
    trainer = trainer_of(
        loaded, rows, tmp_path, None if late else callback, report_to="tensorboard", save_strategy="no"
    )
    if late:
        trainer.add_callback(callback)
    with quiet():
        trainer.train()
    found = scalars(tmp_path)
    assert found["train/selected"] == [(step, 10.0 * step) for step in range(1, STEPS + 1)] + [(STEPS, 60.0)]
    assert {value for _, value in found["train/budget"]} == {60.0}
    assert found["train/entropy"][-1] == (STEPS, pytest.approx(tuner.entropy))
    assert len(found["train/cutoff"]) == STEPS + 1
    assert [value for _, value in found["train/quota"]][:STEPS] == [10.0] * (STEPS - 1) + [0.0]
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 1))


def test_every_tracker_of_transformers_gets_them(loaded, rows, tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen = {}

    def recorder(name):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.setdefault(name, []).append(dict(logs))

        return type(name, (TrainerCallback,), {"on_log": on_log})

    names = list(integration_utils.INTEGRATION_TO_CALLBACK)
    monkeypatch.setattr(integration_utils, "INTEGRATION_TO_CALLBACK", {name: recorder(name) for name in names})
    tuner = st.attach(loaded.model, st.id3(budget=60, steps=STEPS))
    trainer = trainer_of(loaded, rows, tmp_path, SelectuneCallback(tuner), report_to=names, save_strategy="no")
    with quiet():
        trainer.train()
    assert len(names) > 10
    for name in names:
        assert [logs["selected"] for logs in seen[name] if "loss" in logs] == [10, 20, 30, 40, 50, 60], name
        assert all("quota" in logs and "budget" in logs for logs in seen[name]), name


def test_it_stands_first_once(loaded, rows, tmp_path):
    tuner = st.attach(loaded.model, st.id3(budget=60, steps=STEPS))
    callback = SelectuneCallback(tuner)
    trainer = trainer_of(loaded, rows, tmp_path, callback, save_strategy="no")
    others = [kept for kept in trainer.callback_handler.callbacks if kept is not callback]
    assert trainer.callback_handler.callbacks[0] is callback
    with quiet():
        trainer.train()
    assert trainer.callback_handler.callbacks == [callback, *others]
