"""The callback in plain transformers.Trainer and in TRL's SFTTrainer: checkpoints, logs, what it refuses."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from trainer_kit import STEPS, causal, sft_of, trainer_of

import selectune as st
from selectune import tasks
from selectune.delta import weights_digest
from selectune.errors import ConfigError
from selectune.integrations.transformers import SelectuneCallback
from selectune.models.bases import load_model, quiet

RTE = tasks.get("glue/rte")


pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def loaded(tiny):
    return load_model(str(tiny), RTE.head, 0)


@pytest.fixture
def rows(loaded, data):
    return RTE.encode(loaded.tokenizer, tasks.load(RTE, "train", data).examples, 32)


def test_checkpoints_and_logs(loaded, rows, tmp_path, tiny):
    base = weights_digest(loaded.model)
    tuner = st.attach(loaded.model, st.id3(budget=60, steps=STEPS))
    trainer = trainer_of(loaded, rows, tmp_path, SelectuneCallback(tuner, {**loaded.base(), "id": "tiny"}))
    with quiet():
        trainer.train()

    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        delta = st.load(folder)
        assert delta.selected == 10 * step
        assert delta.info["base"]["id"] == "tiny"
        fresh = load_model(str(tiny), RTE.head, 0).model
        delta.apply(fresh)
        saved = type(fresh).from_pretrained(folder)
        assert weights_digest(fresh) == weights_digest(saved)  # the checkpoint is base + delta, an ordinary model

    logs = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["selected"] for record in logs] == [10, 20, 30, 40, 50, 60]
    assert {record["budget"] for record in logs} == {60}
    assert logs[0]["quota"] == 10
    assert sum(p.numel() for p in trainer.optimizer.param_groups[0]["params"]) == 60

    tuner.detach()
    assert weights_digest(loaded.model) == base


def test_accumulation_must_agree(loaded, rows, tmp_path):
    tuner = st.attach(loaded.model, st.id3(budget=60, steps=STEPS))
    trainer = trainer_of(loaded, rows, tmp_path, SelectuneCallback(tuner), gradient_accumulation_steps=3)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=3 .* accumulation_steps=1"):
        trainer.train()


def test_accumulation_that_agrees(loaded, rows, tmp_path):
    tuner = st.attach(loaded.model, st.id3(budget=60, steps=STEPS), accumulation_steps=3)
    options = {"gradient_accumulation_steps": 3, "save_strategy": "no"}
    with quiet():
        trainer_of(loaded, rows, tmp_path, SelectuneCallback(tuner), **options).train()
    assert (tuner.step, tuner.selected) == (STEPS, 60)
    assert tuner.verify().changed > 0


def test_the_best_checkpoint_can_be_loaded_at_the_end(loaded, rows, tmp_path):
    tuner = st.attach(loaded.model, st.id3(budget=60, steps=STEPS))
    trainer = trainer_of(
        loaded, rows, tmp_path, SelectuneCallback(tuner),
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_strategy="steps",
    )  # fmt: skip
    with quiet():
        trainer.train()
    assert tuner.verify().selected == 60


@pytest.mark.parametrize("make", [lambda: st.lt_sft(60, STEPS, dense=3), lambda: st.diff_pruning(60, STEPS)])
def test_checkpoints_of_a_dense_phase_are_dense(loaded, rows, tmp_path, tiny, make):
    base, everything = weights_digest(loaded.model), sum(p.numel() for p in loaded.model.parameters())
    tuner = st.attach(loaded.model, make(), accumulation_steps=2)
    trainer = trainer_of(loaded, rows, tmp_path, SelectuneCallback(tuner), gradient_accumulation_steps=2)
    with quiet():
        trainer.train()
    assert (tuner.step, tuner.selected, tuner.verify().changed) == (STEPS, 60, 60)
    sizes = []
    for step in (2, 4, 6):
        delta = st.load(tmp_path / f"checkpoint-{step}")
        sizes.append((delta.selected, sum(d.tensor.numel() for d in delta.dense)))
        fresh = load_model(str(tiny), RTE.head, 0).model
        delta.apply(fresh)
        assert weights_digest(fresh) == weights_digest(type(fresh).from_pretrained(tmp_path / f"checkpoint-{step}"))
    assert sizes == [(0, everything), (60, 0), (60, 0)]
    moments = [s for state in trainer.optimizer.state.values() for s in state.values() if s.numel() > 1]
    assert sum(s.numel() for s in moments) == 2 * 60
    tuner.detach()
    assert weights_digest(loaded.model) == base


def test_a_trainer_that_shards_is_refused():
    tuner = st.attach(torch.nn.Linear(8, 4), st.id3(budget=6, steps=STEPS))
    with pytest.raises(ConfigError, match=r"fsdp=True\) shards the model after.*add_to"):
        SelectuneCallback(tuner).on_init_end(SimpleNamespace(fsdp=True), None, None)


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_plugin"])  # by the Trainer's arguments, or by accelerate's
@pytest.mark.parametrize("late", [False, True], ids=["made with it", "added later"])
def test_a_trainer_with_deepspeed_is_refused(name, late):
    callback = SelectuneCallback(st.attach(torch.nn.Linear(8, 4), st.id3(budget=6, steps=STEPS)))
    trainer = SimpleNamespace(args=SimpleNamespace(**{name: object()}))
    with pytest.raises(ConfigError, match=r"The Trainer runs DeepSpeed, which is not supported.*without DeepSpeed"):
        callback.add_to(trainer) if late else callback.on_init_end(trainer.args, None, None)


def test_another_model_is_refused(loaded, rows, tmp_path, tiny):
    tuner = st.attach(loaded.model, st.id3(budget=60, steps=STEPS))
    stranger = load_model(str(tiny), RTE.head, 0)
    with pytest.raises(ConfigError, match="not the model of this tuner"):
        trainer_of(stranger, rows, tmp_path, SelectuneCallback(tuner)).train()


def test_other_steps_than_planned_are_said(loaded, rows, tmp_path, caplog):
    tuner = st.attach(loaded.model, st.id3(budget=60, steps=50))
    with caplog.at_level(logging.WARNING, logger="selectune"), quiet():
        trainer_of(loaded, rows, tmp_path, SelectuneCallback(tuner), save_strategy="no").train()
    assert "steps=50, the Trainer will take 6: the budget will not be used up" in caplog.text


def test_sft_with_trl(tmp_path):
    """A causal language model with tied weights, tuned by TRL's trainer as it is."""
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("datasets")
    model, tokenizer = causal(tmp_path)
    base = weights_digest(model)
    tuner = st.attach(model, st.id3(budget=80, steps=4), accumulation_steps=2)
    with quiet():
        trainer = sft_of(model, tokenizer, tmp_path / "out", tuner)
        trainer.train()
    assert (tuner.step, tuner.selected) == (4, 80)
    verified = tuner.verify()
    assert 0 < verified.changed <= 80
    assert st.load(tmp_path / "out" / "checkpoint-2").selected == 40
    assert [record["selected"] for record in trainer.state.log_history if "loss" in record] == [20, 40, 60, 80]
    tuned = weights_digest(model)
    saved = tuner.save(tmp_path / "delta")
    tuner.detach()
    assert weights_digest(model) == base != tuned
    with st.load(saved).applied(model):
        assert weights_digest(model) == tuned


def test_sft_gives_tied_weights_the_whole_gradient(tmp_path):
    """TRL hands the head's weight, which is the embeddings' too, to an autograd function of its own."""
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("datasets")
    moved = []
    for sparse in (False, True):
        model, tokenizer = causal(tmp_path)
        tuner = st.attach(model, st.random(budget=0.3), accumulation_steps=2) if sparse else None
        optimizer = torch.optim.SGD(model.parameters() if tuner is None else tuner.parameters(), lr=1.0)
        options = {"max_steps": 1, "max_grad_norm": 0.0, "save_strategy": "no"}
        with quiet():
            sft_of(model, tokenizer, tmp_path / "out", tuner, optimizer, **options).train()
        moved.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    dense, ours = moved
    assert tuner.support["model.embed_tokens.weight"].numel() > 100
    for name, flat in tuner.support.items():
        torch.testing.assert_close(ours[name].view(-1)[flat], dense[name].view(-1)[flat], rtol=1e-4, atol=1e-6)
