"""Any loop, run by the engine and by the dense oracle: `loop(trainer, step)` does the forwards and backward passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import DenseOracle
from side_by_side import EXACT, Plan, id3, sgd
from torch import Tensor, nn

import selectune as st

X = [torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(40)]


@dataclass
class Trainer:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    tuner: st.Tuner | None  # the oracle has none


Loop = Callable[[Trainer, int], None]


class Tied(nn.Module):
    """Two linear layers of one weight, two heads; float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.b.weight = self.a.weight
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.b(self.a(x).tanh()).tanh()
        return self.one(h), self.two(h)


def loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return outputs[0].square().mean() + outputs[1].square().mean()


def assert_same(
    model: nn.Module, loop: Loop, *, steps: int = 4, plan: Plan | None = None, accumulation: int = 1
) -> st.Tuner:
    """The oracle's support after every step and its weights at the end; detach leaves the base's bits."""
    plan = plan or id3(40, steps)
    ours, dense = copy.deepcopy(model), copy.deepcopy(model)
    tuner = st.attach(ours, plan.method, accumulation_steps=accumulation)
    one = Trainer(ours, sgd(tuner.parameters()), tuner)
    oracle = DenseOracle(list(dense.parameters()), plan.rule, sgd(dense.parameters()))
    other = Trainer(dense, oracle.optimizer, None)
    number = {name: t for t, (name, _) in enumerate(model.named_parameters())}
    for step in range(steps):
        loop(one, step)
        one.optimizer.step()
        one.optimizer.zero_grad()
        loop(other, step)
        oracle.step()
        mine = {(number[name], i) for name, flat in tuner.support.items() for i in flat.tolist()}
        assert mine == oracle.supports[-1], f"step {step}"
    assert tuner.step == steps
    tuner.verify()
    for name, expected in dense.named_parameters():
        assert float((ours.get_parameter(name) - expected).detach().abs().max()) <= EXACT, name
    tuner.detach()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))
    return tuner
