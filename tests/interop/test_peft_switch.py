"""The bridge's adapter is disabled and enabled: every trained value goes and comes back, whatever is asked then."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import quant_kit
import torch
from interop_kit import load, logits, make_llama, tokens

import selectune as st
from selectune.errors import DeltaError, TunerError

peft = pytest.importorskip("peft")
bridge = pytest.importorskip("selectune.interop.peft")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "base")


def made(base: Any, **more: Any) -> Any:
    return peft.get_peft_model(base, bridge.SelectuneConfig(**{"method": "id3", "budget": 60, "steps": 4, **more}))


def trained(base: Any, reference: bool = False, **more: Any) -> Any:
    """`reference`: as TRL's DPO does, the base is read between a forward and its backward pass."""
    model = made(base, **more)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        loss = model(tokens()).logits.square().mean()
        if reference:
            with torch.no_grad(), model.disable_adapter():
                model(tokens())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


METHODS = ["id3", "pafi", "static-d3", "repeat-d3", "repeat-random", "lift:rank=4,every=2", "rigl:every=2", "paca"]


@pytest.mark.parametrize("method", METHODS)
def test_dropped_entries_come_back_with_their_trained_values(method, llama, tmp_path):
    steps = None if method in ("pafi", "static-d3", "paca") else 4
    model, base = trained(load(llama), method=method, steps=steps).eval(), logits(load(llama))
    ours, delta = logits(model), model.base_model.tuner.delta()
    assert not torch.equal(ours, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), ours)
    assert model.base_model.tuner.delta() == delta
    model.save_pretrained(tmp_path / "run")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(llama), tmp_path / "run").eval()), ours)


@pytest.mark.parametrize("method", ["id3", "repeat-d3", "random"])
def test_a_reference_between_forward_and_backward_changes_nothing(method, llama):
    steps = None if method == "random" else 4
    runs = [trained(load(llama), reference, method=method, steps=steps) for reference in (False, True)]
    one, other = (run.base_model.tuner.delta() for run in runs)
    assert one == other


@pytest.mark.parametrize("loaded", [False, True], ids=["in training", "loaded"])
@pytest.mark.parametrize("whole", [None, ["lm_head"]])
def test_a_disabled_adapter_is_saved_merged_and_unloaded(whole, loaded, llama, tmp_path):
    def disabled() -> Any:
        model = trained(load(llama), modules_to_save=whole).eval()
        if loaded:
            model.save_pretrained(tmp_path / "run")
            model = peft.PeftModel.from_pretrained(load(llama), tmp_path / "run").eval()
        model.base_model.disable_adapter_layers()
        return model

    base, ours = logits(load(llama)), logits(trained(load(llama), modules_to_save=whole))
    model = disabled()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(model), base)  # it is disabled still
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(llama), tmp_path / "saved").eval()), ours)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), ours)
    assert torch.equal(logits(disabled().merge_and_unload()), ours)
    assert torch.equal(logits(disabled().unload()), base)
    model = disabled()
    with model.disable_adapter():
        plain = model.unload()
    assert torch.equal(logits(plain), base)


def test_a_step_and_the_tuner_itself_say_that_the_adapter_is_disabled(llama):
    model = made(load(llama))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(tokens()).logits.square().mean().backward()
    with model.disable_adapter():
        for call in (optimizer.step, model.base_model.tuner.verify):
            with pytest.raises(TunerError, match="while the adapter is disabled"):
                call()
    optimizer.step()
    assert model.base_model.tuner.step == 1
    with model.disable_adapter():
        model.base_model.tuner.detach()
    assert torch.equal(logits(model), logits(load(llama)))
    model.base_model.disable_adapter_layers()


def test_a_merge_that_is_refused_leaves_the_run_as_it_was(llama):
    base = load(llama)
    quant_kit._own(base)
    model = trained(base)
    ours = logits(model)
    with pytest.raises(DeltaError, match="cannot be merged into its base"):
        model.merge_and_unload()
    assert st.tuner_of(model.get_base_model()) is model.base_model.tuner
    assert torch.equal(logits(model), ours)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("method", ["id3", "repeat-d3"])
@pytest.mark.parametrize("state", ["in training", "loaded", "disabled", "untrained"])
def test_a_copy_is_like_a_model_that_was_loaded(state, method, duplicate, llama, tmp_path):
    run = made(load(llama), method=method) if state == "untrained" else trained(load(llama), method=method)
    model, base = run.eval(), logits(load(llama))
    ours = logits(model)
    model.save_pretrained(tmp_path / "run")
    if state == "loaded":
        model = peft.PeftModel.from_pretrained(load(llama), tmp_path / "run").eval()
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    other = duplicate(model)
    assert torch.equal(logits(other), logits(model))
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), ours)
    other.base_model.enable_adapter_layers()
    assert torch.equal(logits(other), ours)
    with other.disable_adapter():
        assert torch.equal(logits(other), base)
    assert torch.equal(logits(other), ours)
    assert not any(p.requires_grad for p in other.parameters())
    other.save_pretrained(tmp_path / "again")
    read = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "again")]
    assert read[0] == read[1]
    assert torch.equal(logits(duplicate(other).unload()), base)
    assert torch.equal(logits(other.merge_and_unload()), ours)
    assert torch.equal(logits(model), ours)
    if state == "in training":
        model.base_model.tuner.verify()


def test_a_copy_of_the_model_within_is_an_ordinary_model(llama):
    model = trained(load(llama))
    other = st.strip(copy.deepcopy(model.get_base_model()))
    assert torch.equal(logits(other), logits(model))
    assert all(p.requires_grad for p in other.parameters())
    other.selectune_adapter.enable_adapters(False)
    assert torch.equal(logits(other), logits(model))
