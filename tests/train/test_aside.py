"""The trained values leave the model for a while and come back, all of them, and the run goes on as ever."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import quant_kit
import torch
from torch import nn
from train_kit import bits, same

import selectune as st
from selectune.errors import TunerError
from selectune.recipes.named import named

X = [torch.randn(6, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
HEAD = st.Scope(train_fully=["head.*"])
METHODS: dict[str, Any] = {
    "static": lambda: st.pafi(30),
    "static, read": lambda: st.static_d3(30),
    "increment": lambda: st.id3(budget=30, steps=6),
    "increment, by weights": lambda: st.increment_pafi(30, 6),
    "repeat": lambda: st.repeat_d3(30, 6),
    "repeat, drawn": lambda: st.repeat_random(30, 6),
    "afresh, by weights": lambda: st.lift(30, 6, rank=4, every=2),
    "drop and grow": lambda: st.rigl(30, 6, every=2),
    "drop and grow, drawn": lambda: named("set:every=2").make(30, 6),
    "units": lambda: st.paca(32),
    "a window": lambda: st.spiel_ag(30, 6, every=2, window=1),
    "filled with zeros": lambda: st.sparse_adapter(30),
    "dense, then sparse": lambda: st.lt_sft(30, steps=3),
    "dense": lambda: st.lt_sft(30, steps=20, dense=0.5),
    "dense, of latents": lambda: st.diff_pruning(30, steps=20, dense=0.5),
    "all": lambda: st.full(),
    "a head beside": lambda: st.repeat_d3(30, 6, scope=HEAD),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x).tanh()))


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def run(model: nn.Module, method: st.Method, steps: int, between: Any = None) -> st.Tuner:
    """A short run; `between` is called before forward, backward and step, and after the step."""
    between = between or (lambda tuner: None)
    tuner = st.attach(model, method, calibration=X[:2], loss=loss, seed=3)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05)
    for step in range(steps):
        between(tuner)
        value = loss(model, X[step])
        between(tuner)
        value.backward()
        between(tuner)
        optimizer.step()
        between(tuner)
        optimizer.zero_grad()
    return tuner


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_all_that_differs_from_the_base_leaves_and_comes_back(name):
    base, model, undisturbed = Net(), Net(), Net()

    def there_and_back(tuner: st.Tuner) -> None:
        before = bits(model)
        aside = tuner.engine.aside()
        assert same(bits(model), bits(base))
        with torch.no_grad():
            model(X[0])  # a norm in training mode writes its statistics
        assert torch.equal(model(X[1]), copy.deepcopy(base)(X[1]))  # with gradients on, and nothing is selected
        aside.back()
        assert same(bits(model), before)

    tuner = run(model, METHODS[name](), 5, there_and_back)
    wanted = run(undisturbed, METHODS[name](), 5)
    assert not same(bits(model), bits(base))
    assert same(bits(model), bits(undisturbed))
    assert tuner.delta() == wanted.delta()
    assert tuner.events == wanted.events
    tuner.detach()
    assert same(bits(model), bits(base))


@pytest.mark.parametrize("name", ["static", "increment", "repeat", "drop and grow", "units"])
def test_values_beside_quantised_weights_leave_and_come_back(name):
    def made() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        quant_kit._own(model)
        return model

    base, model, undisturbed = made(), made(), made()

    def there_and_back(tuner: st.Tuner) -> None:
        before = model(X[7]).detach()
        aside = tuner.engine.aside()
        assert torch.equal(model(X[7]), base(X[7]))
        aside.back()
        assert torch.equal(model(X[7]), before)

    tuner = run(model, METHODS[name](), 5)
    assert not torch.equal(model(X[7]), base(X[7]))
    there_and_back(tuner)
    run(undisturbed, METHODS[name](), 5)
    assert torch.equal(model(X[7]), undisturbed(X[7]))
    assert tuner.delta() == st.tuner_of(undisturbed).delta()


def test_a_step_that_the_weights_do_not_follow_yet_stays_one():
    """An optimizer without torch's hooks, which writes through `.data`: the tuner learns of its step later."""
    ended = []
    for away in (False, True):
        model = Net()
        tuner = st.attach(model, st.id3(budget=30, steps=6))
        for step in range(3):
            loss(model, X[step]).backward()
            (offsets,) = tuner.parameters()
            assert offsets.grad is not None
            offsets.data -= 0.1 * offsets.grad
            if away:
                tuner.engine.aside().back()
            offsets.grad = None
            model(X[step])
        assert tuner.step == 3
        ended.append(bits(model))
    assert same(*ended)


def test_while_the_values_lie_aside_the_run_does_not_go_on():
    model = Net()
    tuner = run(model, st.repeat_d3(30, 6), 2)
    state, optimizer = tuner.state_dict(), torch.optim.SGD(tuner.parameters(), lr=0.1)
    loss(model, X[2]).backward()
    aside, batch = tuner.engine.aside(), X[3]
    refused = (
        optimizer.step, tuner.verify, tuner.delta, tuner.state_dict, lambda: tuner.load_state_dict(state),
        lambda: tuner.check(batch, loss),
    )  # fmt: skip
    for call in refused:
        with pytest.raises(TunerError, match=r"while the adapter is disabled.*Enable the adapter first"):
            call()
    aside.back()
    optimizer.step()
    tuner.verify()
