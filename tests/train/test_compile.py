"""torch.compile: an attached model runs uncompiled under every backend, and trains as it does without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import selectune as st

BACKENDS = ("eager", "aot_eager", "inductor")


def loss_of(y):
    return (y * torch.linspace(-1, 1, 12)).square().mean() + y.pow(3).mean()


def run(model, forward, method):
    tuner = st.attach(model, method)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    draw, gradients = torch.Generator().manual_seed(1), []
    for _ in range(6):
        forward(torch.randn(4, 12, generator=draw)).backward()
        gradients.append(tuner.parameters()[0].grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    tuner.verify()
    return gradients, {name: flat.tolist() for name, flat in tuner.support.items()}


def module(model, backend):
    compiled = torch.compile(model, backend=backend)
    return lambda x: loss_of(compiled(x))


def function(model, backend):
    return torch.compile(lambda x: loss_of(model(x)), backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return lambda x: loss_of(model(x))


def a_part(model, backend):
    model[2].compile(backend=backend)
    return lambda x: loss_of(model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [module, function, in_place, a_part])
@pytest.mark.parametrize("method", [st.id3(budget=31, steps=3), st.static_d3(budget=31)], ids=["id3", "static"])
def test_selecting_and_other_steps_are_those_of_the_model_as_written(backend, how, method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.LayerNorm(12))
    plain = copy.deepcopy(model)
    ours, support = run(model, how(model, backend), method)
    expected, other = run(plain, lambda x: loss_of(plain(x)), method)
    assert support == other
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(ours, expected, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_before_attach_and_compiled_again_after_detach(caplog):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 12)
    before = compiled(x).detach()
    tuner = st.attach(model, st.static_d3(budget=10))
    compiled(x).sum().backward()
    assert "runs uncompiled" in caplog.text
    assert tuner.selected == 10
    tuner.detach()
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y.detach(), before)
    assert model[0].weight.grad is not None
