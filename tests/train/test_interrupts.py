"""Calls that end without their hooks: an interrupt in forward, a step that raises, a hook that comes first."""

from __future__ import annotations

import pytest
import torch
from loop_kit import Tied, X, assert_same, loss
from side_by_side import id3, increment_pafi
from torch import nn

import selectune as st


def raising(error):
    def hook(*received):
        raise error

    return hook


class Direct(Tied):
    """Uses a weight of the outermost module itself, after its submodules."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, x):
        one, two = super().forward(x)
        return one * self.scale[:4], two * self.scale[4:]


@pytest.mark.parametrize("plan", [id3(40, 4), increment_pafi(30, 4)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("first", [False, True])
def test_a_forward_that_is_interrupted(plan, error, first):
    """torch runs no hook after a KeyboardInterrupt. If a hook before ours raises, ours does not run."""

    def loop(trainer, step):
        if step in (1, 2) and trainer.tuner is not None:
            handle = trainer.model.b.register_forward_pre_hook(raising(error), prepend=first)
            with pytest.raises(error):
                trainer.model(X[step + 9])
            handle.remove()
            assert isinstance(trainer.model.b.bias, nn.Parameter) or error is KeyboardInterrupt
        loss(trainer.model(X[step])).backward()

    assert_same(Direct(), loop, plan=plan)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_step_that_raises_is_a_step_that_was_skipped(error):
    def loop(trainer, step):
        if step in (1, 2) and trainer.tuner is not None:
            loss(trainer.model(X[step + 9])).backward()
            with pytest.raises(error):
                trainer.optimizer.step(raising(error))
            trainer.optimizer.zero_grad()
        loss(trainer.model(X[step])).backward()

    assert assert_same(Tied(), loop).events["skipped_steps"] == 2


def test_a_step_of_a_dense_phase_that_raises():
    """The change that the phase makes to gradients before a step is not made twice at the next step."""

    def run(raises):
        model = Tied()
        tuner = st.attach(model, st.diff_pruning(20, 8, structured=False))
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        if raises:
            with pytest.raises(ValueError):
                optimizer.step(raising(ValueError))
        for step in range(2):
            optimizer.zero_grad()
            loss(model(X[step])).backward()
            optimizer.step()
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(raises=False), run(raises=True), strict=True))
