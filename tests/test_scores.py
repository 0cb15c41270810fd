"""Scores: literal vectors, and the contract that the engine relies on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

import selectune as st

W = torch.tensor([0.1, -2.0, 0.0, 0.5])
G = torch.tensor([0.4, -1.2, 0.1, -0.45])


@pytest.mark.parametrize(
    ("exp", "expected", "order"),
    [
        (-1.0, [0.44, 3.6, 0.1, 0.675], [1, 3, 0, 2]),
        (0.0, [0.4, 1.2, 0.1, 0.45], [1, 3, 0, 2]),
        (1.0, [0.3636, 0.4, 0.1, 0.3], [1, 0, 3, 2]),
        (2.0, [0.3306, 0.1333, 0.1, 0.2], [0, 3, 1, 2]),
    ],
)
def test_d3_vectors(exp, expected, order):
    h = st.scores.d3(exp=exp, eps=1.0)(W, G)
    assert torch.allclose(h, torch.tensor(expected), atol=5e-5)
    assert h.argsort(descending=True).tolist() == order


@given(
    some.lists(some.tuples(some.floats(-4, 4, width=32), some.floats(-4, 4, width=32)), min_size=1, max_size=20),
    some.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0]),
    some.sampled_from([0.001, 0.1, 1.0, 3.0]),
)
def test_d3_is_its_formula(pairs, exp, eps):
    w = torch.tensor([p[0] for p in pairs], dtype=torch.float64)
    g = torch.tensor([p[1] for p in pairs], dtype=torch.float64)
    h = st.scores.d3(exp=exp, eps=eps)(w, g)
    for i, (a, b) in enumerate(zip(w.tolist(), g.tolist(), strict=True)):
        assert math.isclose(h[i].item(), abs(b) / (abs(a) + eps) ** exp, rel_tol=1e-12)
    assert bool((w == torch.tensor([p[0] for p in pairs], dtype=torch.float64)).all())  # inputs are not written to


def test_fish_ranks_by_single_examples_and_d3_by_the_mean():
    examples = torch.tensor([[1.0, -3.0, 0.5], [1.0, 3.0, 0.5]])
    fish = sum(st.scores.fisher()(torch.zeros(3), g) for g in examples)
    assert fish.tolist() == [2.0, 18.0, 0.5]
    assert st.scores.d3(exp=0.0)(torch.zeros(3), examples.mean(0)).argmax().item() == 0


@pytest.mark.parametrize(
    "bad", [{"eps": 0.0}, {"eps": -1.0}, {"eps": math.inf}, {"exp": math.nan}, {"exp": math.inf}, {"eps": True},
            {"eps": 1e-20, "exp": 3.0}],
)  # fmt: skip
def test_exp_and_eps_that_would_divide_by_zero(bad):
    with pytest.raises(st.errors.ConfigError):
        st.id3(10, 5, **bad)


def test_a_maker_of_scores_names_what_it_takes():
    with pytest.raises(st.errors.ConfigError, match=r"Unknown parameter of the score 'd3' 'power'. Known: exp, eps"):
        st.scores.d3(power=3.0)
    with pytest.raises(st.errors.ConfigError, match=r"Unknown reads 'hessian'. Known: nothing, weight"):
        st.score(reads="hessian")
    with pytest.raises(st.errors.ConfigError, match="called once"):
        st.Method(score=st.scores.d3, schedule=None)  # pyright: ignore[reportArgumentType]


def test_lift_takes_the_entries_of_an_approximation_of_low_rank():
    """diag(3, 2, 1) in a rotated basis: the error of rank r is the largest singular value left out."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (3, 5))
    parts = [size * torch.outer(left[:, i], right[i]) for i, size in enumerate((3.0, 2.0, 1.0))]
    matrix = torch.stack(parts).sum(0)
    for rank in (1, 2, 3, 9):
        expected = torch.stack(parts[:rank]).sum(0).abs()
        assert torch.allclose(st.scores.lift(rank=rank)(matrix), expected, atol=1e-12)
    vector = torch.tensor([0.5, -2.0])
    assert torch.equal(st.scores.lift(rank=1)(vector), vector.abs())
    kernel = matrix.view(3, 1, 5)
    assert torch.equal(st.scores.lift(rank=1)(kernel), st.scores.lift(rank=1)(matrix).view(3, 1, 5))


def test_lift_selects_by_matrix_and_again_from_the_weights_as_they_are():
    """Each matrix gives its share; a second selection reads what training made of the weights."""
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    model = torch.nn.Sequential(first, second)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 1.0]]))
        second.weight.copy_(torch.tensor([[0.1, 0.0], [0.0, 0.2]]))
    tuner = st.attach(model, st.lift(2, steps=4, rank=1, every=2))
    assert {n: i.tolist() for n, i in tuner.support.items()} == {"0.weight": [0], "1.weight": [3]}
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0)
    for _ in range(2):
        (2.25 * first.weight[0, 0]).backward()  # 5 -> 0.5 after two steps
        optimizer.step()
        optimizer.zero_grad()
    model(torch.ones(1, 2))
    assert {n: i.tolist() for n, i in tuner.support.items()} == {"0.weight": [3], "1.weight": [3]}
    assert first.weight[0, 0].item() == 0.5  # it keeps what it was trained to
