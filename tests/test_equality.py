"""The engine equals the dense oracle: the same support at every step, the same weights, in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from side_by_side import (
    Plan,
    adamw,
    assert_equal,
    id3,
    increment_pafi,
    momentum,
    pafi,
    repeat_d3,
    sgd,
    static_d3,
)
from torch import Tensor, nn
from torch.nn import functional as F

import selectune as st

# -- models: small, float64, every kind of parameter; called with a seed, they return the loss


class Problem(nn.Module):
    """A network and the data that a seed draws for it; forward gives the loss of one micro-batch."""

    def __init__(self, net: nn.Module, shape: tuple[int, ...], tokens: int = 0) -> None:
        super().__init__()
        self.net, self.shape, self.tokens = net, shape, tokens

    def forward(self, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        if self.tokens:
            x = torch.randint(0, self.tokens, self.shape, generator=draw)
        else:
            x = torch.randn(self.shape, generator=draw, dtype=torch.float64)
        y = self.net(x)
        target = torch.randn(y.shape, generator=draw, dtype=torch.float64)
        return F.mse_loss(y, target)


class Tied(nn.Module):
    """One matrix is table and head, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(ids))))


class Odd(nn.Module):
    """A 0-d and a 3-d parameter, one that is used twice, one never, and one that a branch leaves without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.experts = nn.Parameter(torch.randn(2, 4, 4) / 4)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(3, 3)
        self.flipped = nn.Parameter((torch.randn(5, 4) / 4).t())  # not contiguous

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return torch.einsum("bi,eij->bj", x, self.experts) * self.scale @ self.flipped


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(3, 4, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def mlp() -> Problem:
    return Problem(nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)), (6, 5))


def wide() -> Problem:
    """Large enough that the support is sparse, so that the gradient is sampled and not cut from a dense one."""
    return Problem(nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 20)), (8, 30))


def conv() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), Flat(),
        nn.Linear(48, 2),
    )  # fmt: skip
    return Problem(net, (3, 2, 4, 4))


def words() -> Problem:
    net = nn.Sequential(nn.Embedding(11, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh())
    return Problem(net, (3, 6), tokens=11)


def tied() -> Problem:
    return Problem(Tied(), (3, 5), tokens=9)


def odd() -> Problem:
    return Problem(Odd(), (6, 4))


def recurrent() -> Problem:
    return Problem(Recurrent(), (3, 4, 3))


def attention() -> Problem:
    return Problem(Attention(), (2, 3, 4))


MODELS = (mlp, wide, conv, words, tied, odd, recurrent, attention)
PLANS = {
    "id3": id3,
    "id3-every-3": lambda budget, steps: id3(budget, steps, every=3),
    "id3-front": lambda budget, steps: id3(budget, steps, spread="front"),
    "id3-exp-1": lambda budget, steps: id3(budget, steps, exp=1.0, eps=1e-3),
    "id3-exp-minus-half": lambda budget, steps: id3(budget, steps, exp=-0.5),
    "static-d3": static_d3,
    "increment-pafi": increment_pafi,
    "increment-pafi-every-2": lambda budget, steps: increment_pafi(budget, steps, every=2),
    "pafi": pafi,
}
OPTIMIZERS = (sgd, momentum, adamw)


def build(model, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    return model().double()


def batches(steps: int, accumulation: int, seed: int = 0) -> list[list[int]]:
    """Seeds of the micro-batches of every step."""
    return [[seed * 10_000 + step * 10 + micro for micro in range(accumulation)] for step in range(steps)]


@pytest.fixture(autouse=True)
def zeros_are_meant():
    """PaFi warns where a model holds more exact zeros (biases) than the budget."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("plan", PLANS)
def test_same_support_and_weights(model, optimizer, plan):
    assert_equal(build(model), PLANS[plan](23, 7), optimizer, batches(9, 1))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("plan", ["id3", "id3-every-3", "static-d3", "increment-pafi"])
def test_selection_is_exact_over_the_sum_of_micro_batches(model, accumulation, plan):
    assert_equal(build(model), PLANS[plan](17, 5), adamw, batches(6, accumulation))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_repeat(model, accumulation, every):
    assert_equal(build(model), repeat_d3(13, 5, every=every), sgd, batches(7, accumulation))


@pytest.mark.parametrize("model", MODELS)
def test_random_keeps_its_budget_and_its_seed(model):
    for budget in (1, 19):
        supports = []
        for _ in range(2):
            attached = build(model)
            supports.append(st.attach(attached, st.random(budget=budget), seed=3).support)
        assert sum(flat.numel() for flat in supports[0].values()) == budget
        assert {k: v.tolist() for k, v in supports[0].items()} == {k: v.tolist() for k, v in supports[1].items()}


def test_the_whole_model_is_dense_training():
    """budget = N from step 0: masked training is ordinary training."""
    problem = build(mlp)
    every_scalar = sum(p.numel() for p in problem.parameters())
    for optimizer in OPTIMIZERS:
        run = assert_equal(problem, static_d3(every_scalar), optimizer, batches(4, 1))
        assert len(run.supports[0]) == every_scalar


@pytest.mark.parametrize("budget, steps, run", [(3, 8, 10), (1, 5, 7), (60, 60, 64), (40, 7, 3), (41, 6, 20)])
@pytest.mark.parametrize("every", [1, 3])
def test_budgets_and_steps_that_do_not_fit(budget, steps, run, every):
    """Fewer scalars than steps, T that does not divide B, a run that ends early or goes on."""
    ours = assert_equal(build(mlp), id3(budget, steps, every=every), adamw, batches(run, 1))
    assert len(ours.supports[-1]) == (budget if run >= steps else budget * -(-run // every) * every // steps)


@settings(max_examples=60)
@given(
    seed=some.integers(0, 1000),
    model=some.sampled_from(MODELS),
    optimizer=some.sampled_from(OPTIMIZERS),
    plan=some.sampled_from(sorted(PLANS)),
    budget=some.integers(1, 40),
    steps=some.integers(1, 12),
    extra=some.integers(-3, 3),
    accumulation=some.sampled_from([1, 1, 2, 4]),
)
def test_any_run(seed, model, optimizer, plan, budget, steps, extra, accumulation):
    plan_: Plan = PLANS[plan](budget, steps)
    assert_equal(build(model, seed), plan_, optimizer, batches(max(1, steps + extra), accumulation, seed))


@settings(max_examples=20)
@given(
    seed=some.integers(0, 1000),
    model=some.sampled_from(MODELS),
    budget=some.integers(1, 40),
    steps=some.integers(1, 8),
    every=some.integers(1, 3),
    extra=some.integers(-3, 3),
)
def test_any_repeat(seed, model, budget, steps, every, extra):
    assert_equal(
        build(model, seed),
        repeat_d3(budget, steps, every=every),
        sgd,
        batches(max(1, steps + extra), 1, seed),
    )
