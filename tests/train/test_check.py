"""Tuner.check compares gradients with plain autograd's and names the tensors whose use the engine does not see."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_kit import Mixed, bits, mixed_loss, same, tokens

import selectune as st
from selectune.errors import ConfigError, IntegrityError


def of_squares(model, x):
    return model(x).square().mean()


class Native(nn.Module):
    """The weight of its second layer is used in native code."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        with torch._C.DisableTorchFunctionSubclass():
            return self.b(self.a(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_sound_model_passes_at_every_step_and_nothing_is_changed(dtype):
    torch.manual_seed(0)
    model = Mixed(dtype)
    tuner = st.attach(model, st.id3(budget=60, steps=4), accumulation_steps=2)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for step in range(6):
        mixed_loss(model, tokens(step)).backward()
        before = bits(model), tuner.parameters()[0].grad.clone(), torch.get_rng_state(), tuner.support
        found = tuner.check(tokens(9), mixed_loss)
        assert found.tensors > 5
        assert set(found.without_gradient) == {"unused.weight", "unused.bias"}
        assert same(bits(model), before[0])
        assert torch.equal(tuner.parameters()[0].grad, before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
        mixed_loss(model, tokens(step + 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (tuner.verify().selected, tuner.step, dict(tuner.events)) == (60, 6, {})


def test_checking_leaves_the_run_as_it_would_be():
    def run(checks):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
        tuner = st.attach(model, st.id3(budget=20, steps=4))
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for step in range(4):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            if checks:
                tuner.check(x, of_squares)
            of_squares(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
        return bits(model)

    assert same(run(True), run(False))


def test_uses_that_are_not_seen_are_named():
    model = Native()
    tuner = st.attach(model, st.id3(budget=10, steps=2))
    with pytest.raises(IntegrityError, match=r'4 of the 4 tensors.*"a\.weight" \(never seen\)'):
        tuner.check(torch.randn(4, 6), of_squares)
    part = st.attach(Native(), st.id3(budget=10, steps=2)).model
    part.forward = lambda x: Native.forward(part, x) + part.a(x)
    with pytest.raises(IntegrityError, match=r'"a\.weight", "a\.bias", "b\.weight" \(never seen\)'):
        st.tuner_of(part).check(torch.randn(4, 6), of_squares)


def test_a_penalty_over_the_tuner_s_own_vector_is_named():
    model = nn.Linear(6, 6)
    tuner = st.attach(model, st.static_d3(budget=10))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
    x = torch.randn(4, 6)
    of_squares(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()

    def penalised(model, x):
        return of_squares(model, x) + sum(p.square().sum() for p in model.parameters() if p.shape == (10,)) * 10

    tuner.check(x, of_squares)
    with pytest.raises(IntegrityError, match="own vector"):
        tuner.check(x, penalised)


def test_a_loss_that_is_none():
    tuner = st.attach(nn.Linear(6, 6), st.id3(budget=10, steps=2))
    with pytest.raises(ConfigError, match="scalar tensor"):
        tuner.check(torch.randn(4, 6), lambda model, x: model(x))
    with pytest.raises(ConfigError, match=r"no \.loss"):
        tuner.check(torch.randn(4, 6))
