"""The door: attach and its refusals, state dicts, proofs, saves, detach."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_kit import Mixed, bits, mixed_loss, same, steps, tokens

import selectune as st


def test_an_optimizer_over_the_frozen_weights_is_refused():
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters())
    st.attach(model, st.pafi(60))
    mixed_loss(model, tokens(0)).backward()
    with pytest.raises(st.errors.OptimizerError, match=r"This AdamW holds \d+ weights that attach froze.*after attach"):
        optimizer.step()


def test_an_optimizer_over_all_parameters_made_after_attach_is_fine():
    model = Mixed()
    tuner = st.attach(model, st.id3(60, 6))
    for _ in steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 6):
        pass
    assert tuner.verify().changed == 60


def test_a_second_attach_is_refused_and_harmless():
    model = Mixed()
    tuner = st.attach(model, st.id3(60, 6))
    with pytest.raises(st.errors.AlreadyAttachedError, match="call its detach"):
        st.attach(model, st.pafi(10))
    with pytest.raises(st.errors.AlreadyAttachedError, match='submodule "0" carries a tuner'):
        st.attach(nn.Sequential(model), st.pafi(10))
    for _ in steps(model, torch.optim.SGD(tuner.parameters(), lr=0.1), 6):
        pass
    assert tuner.selected == 60
    tuner.detach()
    with pytest.raises(st.errors.DetachedError, match="Attach anew"):
        tuner.detach()
    assert st.attach(model, st.pafi(10)).selected == 10


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"method": "id3"}, st.errors.ConfigError, "takes a selectune.Method.*got str"),
        ({"accumulation_steps": 0}, st.errors.ConfigError, "accumulation_steps= must be an int of at least 1, got 0"),
        ({"method": st.pafi(10**9)}, st.errors.BudgetError, "larger than the"),
        ({"method": st.fish(10)}, st.errors.CalibrationError, "reads single examples: give attach"),
        ({"model": [1]}, st.errors.ConfigError, "torch.nn.Module, got list"),
    ],
)
def test_attach_refuses_early_and_leaves_the_model_alone(arguments, error, sentence):
    model = Mixed()
    before = bits(model)
    with pytest.raises(error, match=sentence):
        st.attach(**{"model": model, "method": st.pafi(10), **arguments})
    assert all(p.requires_grad for p in model.parameters())
    assert same(bits(model), before)
    assert not model._forward_pre_hooks


def test_state_dict_is_that_of_an_ordinary_model_and_loads_into_one():
    model = Mixed()
    keys = set(model.state_dict())
    tuner = st.attach(model, st.id3(60, 6))
    for _ in steps(model, torch.optim.AdamW(tuner.parameters(), lr=1e-2), 3):
        pass
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert set(state) == keys
    Mixed().load_state_dict(state)
    for _ in steps(model, torch.optim.AdamW(tuner.parameters(), lr=1e-2), 3, start=3):
        pass
    assert model.load_state_dict(state).missing_keys == []  # back to the best checkpoint
    now = bits(model)
    mixed_loss(model, tokens(0))  # a forward must not write later values over it
    assert same(bits(model), now)
    assert tuner.verify().changed == 30
    with pytest.raises(st.errors.IntegrityError, match="tensors outside the support"):
        model.load_state_dict(Mixed().state_dict())


def test_frozen_weights_that_somebody_moves_are_found():
    model = Mixed()
    tuner = st.attach(model, st.random(60))
    free = next(i for i in range(64) if i not in tuner.support["linear.weight"])
    with torch.no_grad():
        model.linear.weight.view(-1)[free] += 1e-6
    with pytest.raises(st.errors.IntegrityError, match=r"1 tensors changed outside the support.*linear.weight"):
        tuner.verify()
    with pytest.raises(st.errors.IntegrityError):
        tuner.save("nowhere")


def test_frozen_weights_that_change_places_are_found():
    model = Mixed()
    tuner = st.attach(model, st.random(60))
    free = [i for i in range(64) if i not in tuner.support["linear.weight"]][:2]
    with torch.no_grad():
        flat = model.linear.weight.view(-1)
        flat[free] = flat[free[::-1]]
    with pytest.raises(st.errors.IntegrityError, match=r"1 tensors changed outside the support.*linear.weight"):
        tuner.verify()


def test_a_cast_while_attached_is_refused():
    model = Mixed()
    st.attach(model, st.pafi(60))
    model.bfloat16()
    with pytest.raises(st.errors.IntegrityError, match="Cast the model before attach"):
        model(tokens(0))


def test_buffers_that_training_changed_are_in_the_delta_and_come_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = bits(model)
    tuner = st.attach(model, st.id3(6, 3, scope="*.weight"))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = bits(model)
    delta = tuner.delta()
    tuner.detach()
    assert same(bits(model), before)
    delta.apply(model)
    assert same(bits(model), after)
    delta.revert(model)
    assert same(bits(model), before)


def test_an_empty_run_is_not_saved(tmp_path):
    model = Mixed()
    tuner = st.attach(model, st.id3(60, 6))
    with pytest.raises(st.errors.NothingTrainedError, match="no scalar was selected"):
        tuner.save(tmp_path)
    for _ in steps(model, torch.optim.SGD(tuner.parameters(), lr=0.0), 2):
        pass
    with pytest.raises(st.errors.NothingTrainedError, match="no trained scalar moved"):
        tuner.save(tmp_path)
    assert not list(tmp_path.iterdir())
    assert tuner.save(tmp_path, allow_empty=True) == tmp_path / "delta.safetensors"


def test_non_finite_values_are_not_saved(tmp_path):
    model = Mixed()
    tuner = st.attach(model, st.random(60))
    with torch.no_grad():
        tuner.parameters()[0][3] = torch.nan
    with pytest.raises(st.errors.NonFiniteError, match="NaN or infinite"):
        tuner.save(tmp_path)


def test_a_delta_records_what_else_it_is_told(tmp_path):
    model = Mixed()
    tuner = st.attach(model, st.id3(60, 6))
    for _ in steps(model, torch.optim.SGD(tuner.parameters(), lr=0.1), 6):
        pass
    plain = tuner.delta()
    more = {"method": {"task": "glue/stsb", "max_length": 64}, "versions": {"peft": "1.2"}}
    told = st.load(tuner.save(tmp_path, info=more)).info
    assert told["method"] == {**plain.info["method"], "task": "glue/stsb", "max_length": 64}
    assert told["versions"] == {**plain.info["versions"], "peft": "1.2"}
    assert {k: v for k, v in told.items() if k not in more} == {k: v for k, v in plain.info.items() if k not in more}
    for wrong, why in (
        ({"method": {"seed": 3}}, "names fields of 'method' that the run records itself: seed"),
        ({"selected": {}}, 'takes fields of "method" and of "versions", by name; got \'selected\''),
        ({"method": "mine"}, "got 'method': 'mine'"),
    ):
        with pytest.raises(st.errors.ConfigError, match=why):
            tuner.save(tmp_path / "other", info=wrong)
    assert not (tmp_path / "other").exists()
