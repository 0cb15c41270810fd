"""Closures, zero_grad, critics and sharpness-aware steps end a window as they end a step of dense training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import selectune as st

X = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def begin(accumulation=1, budget=20, steps=4):
    torch.manual_seed(0)
    model = nn.Linear(8, 8).double()
    tuner = st.attach(model, st.id3(budget, steps), accumulation_steps=accumulation)
    return model, tuner, torch.optim.SGD(tuner.parameters(), lr=0.1)


def support(tuner):
    return {name: flat.tolist() for name, flat in tuner.support.items()}


def close(a, b):
    return all(torch.allclose(x, y, rtol=0, atol=1e-12) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("in_closure", [1, 2, 3])
def test_a_closure_may_hold_the_last_backward_passes_of_a_window(in_closure):
    def run(split):
        model, tuner, optimizer = begin(accumulation=3)
        for step in range(4):
            parts = [3 * step + k for k in range(3)]
            before, within = (parts[:-in_closure], parts[-in_closure:]) if split else (parts, [])
            for k in before:
                model(X[k]).square().mean().backward()

            def closure(within=within):
                for k in within:
                    model(X[k]).square().mean().backward()

            optimizer.step(closure) if split else optimizer.step()
            optimizer.zero_grad()
        return support(tuner), dict(tuner.events), tuner.step, [p.detach().clone() for p in model.state_dict().values()]

    *ours, weights = run(True)
    *other, expected = run(False)
    assert ours == other
    assert close(weights, expected)


def test_a_short_window_whose_last_pass_is_in_a_closure():
    def run(split):
        model, tuner, optimizer = begin(accumulation=3)
        for step in range(4):
            model(X[step]).square().mean().backward()
            if split:
                optimizer.step(lambda k=step + 4: model(X[k]).square().mean().backward())
            else:
                model(X[step + 4]).square().mean().backward()
                optimizer.step()
            optimizer.zero_grad()
        return support(tuner), dict(tuner.events), tuner.step

    assert run(True) == run(False)
    assert run(True)[1] == {"short_windows": 4}


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("dropped", [1, 2])
@pytest.mark.parametrize("passes", [2, 3])
def test_a_gradient_that_was_thrown_away_is_not_scored(to_none, dropped, passes):
    def run(drops):
        model, tuner, optimizer = begin(accumulation=3)
        for step in range(4):
            if drops and (step > 0 or to_none):  # before anything is selected the gradient is 0 anyway
                for _ in range(dropped):
                    (model(X[11]) * 100).square().mean().backward()
                optimizer.zero_grad(set_to_none=to_none)
            for k in range(passes):
                model(X[2 * step + k]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert tuner.verify().selected == 20
        return support(tuner)

    assert run(True) == run(False)


def test_a_critic_s_passes_with_a_generator_s_between():
    """The generator's pass goes through the critic too, and what it leaves there is thrown away."""
    model, tuner, optimizer = begin(accumulation=2)
    alone, plain, stepper = begin(accumulation=2)
    made = nn.Linear(8, 8).double()
    for step in range(4):
        model(made(X[11])).mean().backward()
        made.zero_grad()
        optimizer.zero_grad()
        for net in (model, alone):
            net(X[step]).square().mean().backward()
            net(X[step + 4]).square().mean().backward()
        optimizer.step(), stepper.step()
        optimizer.zero_grad(), stepper.zero_grad()
    assert support(tuner) == support(plain)
    assert tuner.step == plain.step == 4
    assert close(model.state_dict().values(), alone.state_dict().values())


def test_a_critic_held_frozen_while_the_generator_trains():
    model, tuner, optimizer = begin(accumulation=2)
    for step in range(4):
        model.requires_grad_(False)
        x = X[11].clone().requires_grad_(True)
        model(x).sum().backward()
        assert torch.allclose(x.grad, model.weight.detach().sum(0).expand(5, 8))
        model.requires_grad_(True)  # as torch users write it: of all parameters
        for k in range(2):
            model(X[step + k]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.verify().selected == 20
    assert (tuner.step, dict(tuner.events)) == (4, {})


def test_sharpness_aware_steps_count_once_and_leave_the_base_alone():
    model, tuner, optimizer = begin()
    (offsets,) = tuner.parameters()
    base = copy.deepcopy(model.state_dict())
    for step in range(4):
        model(X[step]).square().mean().backward()
        with torch.no_grad():
            old = offsets.clone()
            offsets.add_(offsets.grad, alpha=0.05)
        optimizer.zero_grad()
        model(X[step]).square().mean().backward()
        with torch.no_grad():
            offsets.copy_(old)
        optimizer.step()
        optimizer.zero_grad()
        assert (tuner.step, tuner.selected) == (step + 1, 5 * (step + 1))
    assert tuner.verify().changed == 20
    tuner.detach()
    assert all(torch.equal(now, base[name]) for name, now in model.state_dict().items())


def test_a_sharpness_aware_optimizer_with_a_closure():
    class Sharp(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure):
            (p,) = self.param_groups[0]["params"]
            old = p.clone()
            p.add_(p.grad, alpha=0.05)
            self.zero_grad()
            with torch.enable_grad():
                closure()
            p.copy_(old).sub_(p.grad, alpha=0.1)

    model, tuner, _ = begin()
    optimizer = Sharp(tuner.parameters())
    for step in range(4):
        model(X[step]).square().mean().backward()
        optimizer.step(lambda k=step: model(X[k]).square().mean().backward())
        optimizer.zero_grad()
    assert (tuner.step, tuner.verify().changed) == (4, 20)


def test_looking_at_weights_between_steps_changes_nothing():
    def run(looks):
        model, tuner, optimizer = begin(accumulation=2)
        for step in range(4):
            for k in range(2):
                model(X[step + k]).square().mean().backward()
                if looks:
                    (model.weight - 1).abs().mean().detach().item()
            optimizer.step()
            if looks:
                (model.weight * 2).sum()
            optimizer.zero_grad()
        return support(tuner), model.state_dict()["weight"].tolist(), dict(tuner.events)

    assert run(True) == run(False)
