"""selectune as a method of peft: get_peft_model, save, load, disable, merge; and a trainer of TRL over it."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_kit import load, logits, make_llama, tokens

import selectune as st
from selectune.errors import BaseMismatchError, ConfigError, IntegrityError

peft = pytest.importorskip("peft")
bridge = pytest.importorskip("selectune.interop.peft")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "base")


def config(**more: Any) -> Any:
    return bridge.SelectuneConfig(**{"method": "id3:exp=1", "budget": 60, "steps": 4, **more})


def trained(folder: Path, **more: Any) -> Any:
    model = peft.get_peft_model(load(folder), config(**more))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        model(tokens()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("whole", [None, ["lm_head"]])
def test_a_run_is_saved_loaded_disabled_and_merged_bit_for_bit(whole, llama, tmp_path):
    model, base = trained(llama, modules_to_save=whole), logits(load(llama))
    ours = logits(model)
    assert not torch.equal(ours, base)
    tuner = st.tuner_of(model.get_base_model())
    assert tuner is not None
    assert tuner.selected == 60
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), ours)
    model.save_pretrained(tmp_path / "run")
    found = peft.PeftModel.from_pretrained(load(llama), tmp_path / "run").eval()
    assert torch.equal(logits(found), ours)
    assert not any(p.requires_grad for p in found.parameters())
    with found.disable_adapter():
        assert torch.equal(logits(found), base)
    assert torch.equal(logits(found), ours)
    found.save_pretrained(tmp_path / "again")
    read = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "again")]
    assert read[0] == read[1]
    for plain in (model.merge_and_unload(), found.merge_and_unload()):
        assert torch.equal(logits(plain), ours)
        assert plain.state_dict().keys() == load(llama).state_dict().keys()


def test_unload_gives_the_base(llama, tmp_path):
    model = trained(llama)
    model.save_pretrained(tmp_path / "run")
    found = peft.PeftModel.from_pretrained(load(llama), tmp_path / "run")
    for plain in (model.unload(), found.unload()):
        assert torch.equal(logits(plain), logits(load(llama)))


def test_the_reference_of_a_preference_loss_may_come_between_forward_and_backward(llama):
    """As in TRL's DPO: the policy's graph is alive while the base is read."""
    gradients = []
    for between in (False, True):
        model = peft.get_peft_model(load(llama), config(method="random", steps=None))
        loss = model(tokens()).logits.square().mean()
        if between:
            with torch.no_grad(), model.disable_adapter():
                model(tokens())
        loss.backward()
        (vector,) = (p for p in model.parameters() if p.requires_grad)
        gradients.append(vector.grad.clone())
    assert torch.equal(*gradients)


def test_a_backward_pass_while_the_adapter_is_off_is_an_error(llama):
    """It would read the base's weights and not those of its forward pass."""
    model = peft.get_peft_model(load(llama), config(method="random", steps=None))
    loss = model(tokens()).logits.square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), model.disable_adapter():
        loss.backward()


def test_refusals(llama, tmp_path):
    trained(llama).save_pretrained(tmp_path / "run")
    other = make_llama(tmp_path / "other", seed=4)
    with pytest.raises(BaseMismatchError):
        peft.PeftModel.from_pretrained(load(other), tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot be trained on"):
        peft.PeftModel.from_pretrained(load(llama), tmp_path / "run", is_trainable=True)
    with pytest.raises(ConfigError, match="not by token indices"):
        config(trainable_token_indices=[1])
    with pytest.raises(ConfigError, match="Unknown method 'lora'"):
        peft.get_peft_model(load(llama), config(method="lora"))
    model = peft.get_peft_model(load(llama), config())
    with pytest.raises(ConfigError, match="takes one selectune adapter"):
        model.add_adapter("second", config())


def test_another_version_of_peft_gets_one_sentence(monkeypatch, caplog):
    monkeypatch.setattr(peft, "__version__", "0.99")
    importlib.reload(bridge)
    assert caplog.messages == ["This bridge was tested with peft 0.21.2, and peft 0.99 is installed."]
    monkeypatch.undo()
    importlib.reload(bridge)
    assert len(caplog.messages) == 1


def test_trl_trains_through_peft_config(llama, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["the dog runs .", "a cat sleeps .", "the bird sees a tree ."] * 8})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=4, learning_rate=5e-2, bf16=False,
        report_to="none", use_cpu=True, save_strategy="no", gradient_checkpointing=False, max_length=16,
    )  # fmt: skip
    from transformers import AutoTokenizer

    base = load(llama)
    trainer = trl.SFTTrainer(
        model=base, args=arguments, train_dataset=rows, peft_config=config(),
        processing_class=AutoTokenizer.from_pretrained(llama),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    ours = logits(trainer.model.eval())
    found = peft.PeftModel.from_pretrained(load(llama), tmp_path / "run").eval()
    assert torch.equal(logits(found), ours)
    assert not torch.equal(ours, logits(load(llama)))
    tuner = st.tuner_of(trainer.model.get_base_model())
    assert tuner is not None
    assert (tuner.step, tuner.selected) == (4, 60)


def test_a_best_checkpoint_that_could_not_be_loaded_is_refused_as_training_starts(llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    from selectune.integrations.transformers import SelectuneCallback

    model = peft.get_peft_model(load(llama), config())
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=4, eval_strategy="steps", save_strategy="steps", eval_steps=2,
        save_steps=2, load_best_model_at_end=True, report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[SelectuneCallback(st.tuner_of(model))]
    )
    with pytest.raises(
        ConfigError, match=r"load_best_model_at_end=True puts a checkpoint's delta on the model by peft"
    ):
        trainer.train()
    assert st.tuner_of(model).step == 0


def trainer_of(llama: Path, folder: Path, **more: Any) -> Any:
    """A Trainer of a peft model with the callback, which is added to it afterwards, as TRL's peft_config= needs."""
    transformers = pytest.importorskip("transformers")
    from selectune.integrations.transformers import SelectuneCallback

    torch.manual_seed(7)
    model = peft.get_peft_model(load(llama), config(steps=6, **more))
    rows = [{"input_ids": row, "labels": row} for row in tokens().repeat(5, 1)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=3, learning_rate=0.05,
        report_to="none", use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    SelectuneCallback(st.tuner_of(model), full=False).add_to(trainer)
    return trainer


def bytes_of(trainer: Any) -> bytes:
    return st.tuner_of(trainer.model).delta().to_bytes()


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}, {"method": "repeat-d3"}], ids=str)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(more, llama, tmp_path):
    whole = trainer_of(llama, tmp_path / "whole", **more)
    whole.train()
    for step in (2, 4):
        again = trainer_of(llama, tmp_path / f"from-{step}", **more)
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", tmp_path / f"from-{step}/checkpoint-{step}")
        again.train(resume_from_checkpoint=True)
        assert st.tuner_of(again.model).step == 6
        assert bytes_of(again) == bytes_of(whole)
        assert torch.equal(logits(again.model.eval()), logits(whole.model.eval()))


def test_the_delta_of_another_checkpoint_is_not_resumed_from(llama, tmp_path):
    from selectune.files import seal

    trainer_of(llama, tmp_path / "out").train()
    early, late = (tmp_path / f"out/checkpoint-{step}" for step in (2, 4))
    shutil.copy(early / "adapter_model.safetensors", late)
    seal(late, {"step": 4})
    again = trainer_of(llama, tmp_path / "again")
    with pytest.raises(IntegrityError, match="is not that of the tuner's state beside it"):
        again.train(resume_from_checkpoint=str(late))
    fresh = trainer_of(llama, tmp_path / "fresh")
    with pytest.raises(ConfigError, match="a tuner whose training has not begun"):
        fresh.model.load_adapter(str(early), "default", is_trainable=True)
    assert st.tuner_of(fresh.model).step == 0
