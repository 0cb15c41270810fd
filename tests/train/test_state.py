"""The state of a run between steps: what it refuses, and what a file may hold of it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load, save
from train_kit import Mixed, bits, mixed_loss, same, steps, tokens

import selectune as st
from selectune.errors import BaseMismatchError, ConfigError, TunerError


def begin(method=None, **arguments):
    torch.manual_seed(0)
    model = Mixed()
    tuner = st.attach(model, method or st.repeat_d3(60, 6), **arguments)
    return model, tuner, torch.optim.AdamW(tuner.parameters(), lr=1e-2)


def after(count, **arguments):
    model, tuner, optimizer = begin(**arguments)
    for _ in steps(model, optimizer, count):
        pass
    optimizer.zero_grad()
    return model, tuner, optimizer


def test_the_tensors_fit_into_safetensors():
    model, tuner, optimizer = after(3)
    state = tuner.state_dict()
    packed = load(save(state["tensors"]))
    model_2, tuner_2, optimizer_2 = begin()
    tuner_2.load_state_dict({"info": state["info"], "tensors": packed})
    optimizer_2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(bits(model), bits(model_2))
    for _ in zip(steps(model, optimizer, 3, 3), steps(model_2, optimizer_2, 3, 3), strict=True):
        assert same(bits(model), bits(model_2))


def test_the_state_is_a_copy():
    model, tuner, optimizer = after(2)
    state = tuner.state_dict()
    before = {key: tensor.clone() for key, tensor in state["tensors"].items()}
    for _ in steps(model, optimizer, 2, 2):
        pass
    assert all(torch.equal(tensor, before[key]) for key, tensor in state["tensors"].items())


def test_within_a_window_it_is_refused():
    model, tuner, optimizer = begin(accumulation_steps=2)
    mixed_loss(model, tokens(0)).backward()
    with pytest.raises(TunerError, match="after 1 of 2 backward passes"):
        tuner.state_dict()
    mixed_loss(model, tokens(1)).backward()
    with pytest.raises(TunerError, match="after 2 of 2 backward passes"):
        tuner.state_dict()
    optimizer.step()
    tuner.state_dict()


def test_a_tuner_that_has_trained_takes_no_state():
    _, tuner, _ = after(2)
    with pytest.raises(TunerError, match=r"at step 2\. Attach anew"):
        tuner.load_state_dict(tuner.state_dict())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": st.repeat_d3(60, 7)}, "its method is"),
        ({"method": st.repeat_d3(61, 6)}, "its method is"),
        ({"seed": 1}, "its seed is 0, this tuner's is 1"),
        ({"accumulation_steps": 2}, "its accumulation_steps is 1, this tuner's is 2"),
    ],
)
def test_the_state_of_another_run(arguments, said):
    state = after(2)[1].state_dict()
    model, tuner, _ = begin(**arguments)
    before = bits(model)
    with pytest.raises(ConfigError, match=said):
        tuner.load_state_dict(state)
    assert same(bits(model), before)
    assert tuner.step == 0


def test_another_base():
    state = after(2)[1].state_dict()
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():
        model.linear.weight[0, 0] += 1
    tuner = st.attach(model, st.repeat_d3(60, 6))
    before = bits(model)
    with pytest.raises(BaseMismatchError, match=r"another base: 1 tensors differ \(linear.weight\)"):
        tuner.load_state_dict(state)
    assert same(bits(model), before)


def test_damaged_states():
    state = after(2)[1].state_dict()
    key = next(k for k, t in state["tensors"].items() if k.endswith(".flat") and t.numel())
    damages = {
        "values": state["tensors"]["values"][:-1],
        key: state["tensors"][key] + 10**9,
        key.replace("flat", "slot"): state["tensors"][key.replace("flat", "slot")][:-1],
    }
    model, tuner, _ = begin()
    before = bits(model)
    for name, tensor in damages.items():
        with pytest.raises(ConfigError, match="The state's"):
            tuner.load_state_dict({"info": state["info"], "tensors": state["tensors"] | {name: tensor}})
    for wrong in ({}, {"info": 1, "tensors": {}}, {"info": {**state["info"], "version": 2}, "tensors": {}}):
        with pytest.raises(ConfigError, match=r"keys|version 2"):
            tuner.load_state_dict(wrong)
    assert same(bits(model), before)
