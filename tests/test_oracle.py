"""The oracle and the engine against the literal vectors of the papers' formulas.

Every vector runs twice: through `oracle.DenseOracle` and through `selectune.attach`, on a model whose
gradient is given, so that both must agree with the numbers written here by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from oracle import cumulative, d3_scores, expected_fisher, fisher, front, one_shot, top_k, updates
from side_by_side import (
    Optimizer,
    Plan,
    Run,
    by_engine,
    by_oracle,
    id3,
    increment_pafi,
    pafi,
    repeat_d3,
    sgd,
    static_d3,
)
from torch import Tensor, nn

import selectune as st


class Given(nn.Module):
    """Parameters whose gradients are what the model is called with."""

    def __init__(self, *tensors: Sequence[float]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.tensor(t, dtype=torch.float64) for t in tensors)

    def forward(self, gradients: Sequence[Sequence[float]]) -> Tensor:
        rows = [torch.tensor(g, dtype=torch.float64) for g in gradients]
        return sum(((p * g).sum() for p, g in zip(self.tensors, rows, strict=True)), torch.zeros(()))


@pytest.fixture(params=[by_oracle, by_engine], ids=["oracle", "engine"])
def run(request: pytest.FixtureRequest) -> Callable[..., Run]:
    def start(tensors: Any, gradients: Any, plan: Plan, optimizer: Optimizer = sgd) -> Run:
        return request.param(Given(*tensors), plan, optimizer, [[step] for step in gradients])

    return start


THETA, GRADIENT = [0.1, -2.0, 0.0, 0.5], [0.4, -1.2, 0.1, -0.45]


@pytest.mark.parametrize(
    "exp, scores, order",
    [
        (-1.0, [0.44, 3.6, 0.1, 0.675], [1]),
        (0.0, [0.4, 1.2, 0.1, 0.45], [1]),
        (1.0, [0.3636, 0.4, 0.1, 0.3], [1, 0, 3, 2]),
        (2.0, [0.3306, 0.1333, 0.1, 0.2], [0, 3, 1, 2]),
    ],
)
def test_d3_scores(run, exp, scores, order):
    ours = d3_scores(exp, 1.0)([np.array(THETA)], [np.array(GRADIENT)])
    assert ours[0].tolist() == pytest.approx(scores, abs=5e-5)
    assert [i for _, i in top_k(ours, 4)][: len(order)] == order
    for k in range(1, len(order) + 1):
        assert run([THETA], [[GRADIENT]], static_d3(k, exp=exp)).supports == [{(0, i) for i in order[:k]}]


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def test_id3_grows_by_its_quotas(run):
    assert run([THETA], [[GRADIENT]] * 2, id3(3, 2), still).supports == [{(0, 0)}, {(0, 0), (0, 1), (0, 3)}]


def test_schedules():
    assert cumulative(10, 4) == [2, 3, 2, 3]
    assert front(10, 4) == [3, 3, 2, 2]
    assert cumulative(3, 5) == [0, 1, 0, 1, 1]
    assert front(3, 5) == [1, 1, 1, 0, 0]
    assert cumulative(10, 4, every=3) == [7, 0, 0, 3]


@pytest.mark.parametrize("budget, steps", [(10, 4), (3, 5), (1, 3), (12, 4), (7, 7)])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("spread", ["cumulative", "front"])
def test_schedules_of_the_engine(budget, steps, every, spread):
    plan = id3(budget, steps, every=every, spread=spread)
    reached, counts = 0, []
    for step in range(steps + 3):
        now = plan.method.schedule.target(step) if plan.method.schedule.due(step) else reached
        counts.append(now - reached)
        reached = now
    assert counts == [*plan.rule.quotas, 0, 0, 0]
    assert sum(counts) == budget


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ties_go_to_the_earlier_tensor_and_index(run, k):
    """Ties go by the model's order, although backward shows the last tensor first."""
    order = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert top_k([np.ones(2), np.ones(2)], k) == order[:k]
    assert run([[0, 0], [0, 0]], [[[1, 1], [1, 1]]], static_d3(k)).supports == [set(order[:k])]


def test_entries_without_gradient_are_never_selected(run):
    """The part of the quota that they leave open is carried to the next step."""
    ours = run([[0, 0, 0, 0]], [[[0, 1, 0, -0.0]], [[0, 0, 0, 0]], [[1, 0, 2, 0]]], id3(3, 2))
    assert ours.supports == [{(0, 1)}, {(0, 1)}, {(0, 0), (0, 1), (0, 2)}]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_step_with_a_bad_score_selects_nothing(run, bad):
    """Nothing is selected in any tensor. Selected entries are trained on, and the quota is carried over."""
    gradients = [[[9, 1, 1], [1]], [[1, bad, 1], [5]], [[1, 1, 2], [1]]]
    ours = run([[0, 0, 0], [0]], gradients, id3(3, 3))
    assert ours.supports == [{(0, 0)}, {(0, 0)}, {(0, 0), (0, 1), (0, 2)}]
    assert ours.weights[0].tolist() == pytest.approx([-1.1, -0.1, -0.2])


def test_ties_never_cost_an_entry_trained_before(run):
    """Defect 2 of the papers' toolkit 0.2: it drops entry 0, whose weight then moves and is not saved."""
    ours = run([[0, 0, 0, 0]], [[[9, 1, 1, 1]], [[0, 1, 1, 1]]], id3(2, 2, exp=0.0))
    assert ours.supports == [{(0, 0)}, {(0, 0), (0, 1)}]
    assert ours.weights[0].tolist() == pytest.approx([-0.9, -0.1, 0.0, 0.0])


def test_a_budget_below_the_steps(run):
    """Defect 3: quota 0 is a step without a selection. Defect 4: nothing is added after the planned steps."""
    ours = run([[0, 0, 0]], [[[1, 2, 3]]] * 5, id3(1, 3), sgd)
    assert [len(s) for s in ours.supports] == [0, 0, 1, 1, 1]
    assert ours.supports[-1] == {(0, 2)}


def test_unselected_weights_do_not_decay():
    """Defect 5: AdamW's default weight decay shrinks 1.0 to 0.999 where it can reach."""
    model = Given([1.0, 1.0, 1.0])
    tuner = st.attach(model, st.static_d3(budget=1))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
    model([[0.0, 2.0, 0.0]]).backward()
    optimizer.step()
    assert model.tensors[0].tolist()[::2] == [1.0, 1.0]
    assert model.tensors[0][1].item() == pytest.approx(1.0 - 0.1)  # decay pulls to the base, where the entry is yet


def test_a_late_entry_shares_the_step_count(run):
    """Adam's bias correction belongs to the optimizer's step: the first update at step 1000 is 2.51 lr."""

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.1, eps=1e-30, weight_decay=0.0)

    gradients = [[[5.0, 0.0]]] * 999 + [[[5.0, 1.0]]]
    ours = run([[0.0, 0.0]], gradients, id3(2, 1000, exp=0.0), adam)
    assert len(ours.supports[-2]) == 1
    assert ours.weights[0][1].item() == pytest.approx(-0.25146, abs=1e-5)


def test_repeat_d3(run):
    def sgd1(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    ours = run([[0, 0, 0]], [[[3, 2, 1]], [[1, 2, 1.5]]], repeat_d3(1, 2), sgd1)
    assert ours.supports == [{(0, 0)}, {(0, 1)}]
    assert ours.touched == {(0, 0), (0, 1)}
    assert ours.weights[0].tolist() == [-3.0, -2.0, 0.0]


def test_static_d3(run):
    ours = run([THETA], [[GRADIENT], [[0, 0, 9, 0]], [[0, 9, 0, 0]]], static_d3(2))
    assert ours.supports == [{(0, 0), (0, 3)}] * 3


def test_increment_pafi(run):
    ours = run([[0.3, -0.1, 0.2, -0.4]], [[[1, 1, 1, 1]]] * 3, increment_pafi(3, 3))
    assert ours.supports == [{(0, 1)}, {(0, 1), (0, 2)}, {(0, 0), (0, 1), (0, 2)}]


def test_pafi_is_global(run):
    ours = run([[0.2, 0.2, 0.2], [0.1]], [[[1, 1, 1], [1]]], pafi(2))
    assert ours.supports == [{(1, 0), (0, 0)}]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pafi_takes_exact_zeros_in_order(run):
    ours = run([[0.5, 0.6], [0, 0, 0], [0, 0, 0]], [[[1, 1], [1, 1, 1], [1, 1, 1]]], pafi(3))
    assert ours.supports == [{(1, 0), (1, 1), (1, 2)}]


def test_fisher_is_a_sum_over_examples():
    examples = [[1.0, -3.0, 0.5], [1.0, 3.0, 0.5]]
    assert fisher(examples) == [2.0, 18.0, 0.5]
    mean = np.mean(examples, axis=0)
    assert int(np.argmax(fisher(examples))) == 1
    assert top_k(d3_scores(0.0, 1.0)([np.zeros(3)], [mean]), 1) == [(0, 0)]
    assert expected_fisher([([0.5, 0.5], [[-0.5], [0.5]])]) == pytest.approx([0.25])


def test_fisher_of_the_engine():
    model = Given([0.0, 0.0, 0.0])
    examples = [[[1.0, -3.0, 0.5]], [[1.0, 3.0, 0.5]]]
    tuner = st.attach(
        model, st.fish(budget=2, examples=2), calibration=examples, loss=lambda model, example: model(example)
    )
    assert tuner.support["tensors.0"].tolist() == [0, 1]


def test_updates_are_counted_as_the_theorem_says():
    assert updates(cumulative(12, 4), 4) == 30
    assert updates(one_shot(12), 4) == 48
    assert updates(cumulative(10, 4), 4) == 24


@settings(max_examples=50)
@given(budget=some.integers(1, 40), steps=some.integers(1, 40))
def test_dynamic_masks_cost_half_the_updates(budget, steps):
    """(T+1) B / 2 against T B, exactly where T divides B."""
    assert updates(cumulative(budget * steps, steps), steps) == (steps + 1) * budget * steps // 2
    assert updates(one_shot(budget * steps), steps) == steps * budget * steps


@pytest.mark.parametrize("labels", ["data", "model"])
def test_a_high_score_certifies_high_fisher_information(labels):
    """E[H] <= sqrt(E[g^2]) for exp >= 0 and eps >= 1, every (x, y) enumerated; not for exp < 0."""
    weight = torch.randn(3, 2, dtype=torch.float64)
    xs = torch.randn(4, 2, dtype=torch.float64)
    gradients, chances = [], []
    for x in xs:
        p = torch.softmax(weight @ x, 0)
        for y in range(3):
            gradients.append(torch.outer(p - nn.functional.one_hot(torch.tensor(y), 3), x).numpy())
            chances.append(float(p[y] if labels == "model" else (y == 1)) / len(xs))
    mean = sum(c * g for c, g in zip(chances, gradients, strict=True))
    size = sum(c * abs(g) for c, g in zip(chances, gradients, strict=True))
    root = np.sqrt(sum(c * g * g for c, g in zip(chances, gradients, strict=True)))
    if labels == "model":
        assert abs(mean).max() < 1e-12
    assert (size <= root + 1e-12).all()
    for exp, eps in itertools.product((0.0, 0.5, 1.0, 2.0), (1.0, 2.0)):
        assert (size / (abs(weight.numpy()) + eps) ** exp <= root + 1e-12).all()
    assert d3_scores(-1.0, 1.0)([np.array([1.0])], [np.array([1.0])])[0] > 1.0  # g is -1 or 1: I = 1
