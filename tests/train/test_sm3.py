"""SparseSM3: the dense algorithm on a full matrix, its rows and columns under a tuner, decay towards the base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import selectune as st


def reference(weight, gradients, lr, eps):
    """SM3-II over the rows and columns of a matrix, an entry at a time."""
    w = weight.clone()
    r, c = [0.0] * w.shape[0], [0.0] * w.shape[1]
    for g in gradients:
        v = [[min(r[i], c[j]) + g[i, j].item() ** 2 for j in range(len(c))] for i in range(len(r))]
        for i in range(len(r)):
            for j in range(len(c)):
                w[i, j] -= lr * g[i, j] / (v[i][j] + eps) ** 0.5
        r = [max(row) for row in v]
        c = [max(column) for column in zip(*v, strict=True)]
    return w


def grads(shape, count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def test_the_whole_matrix_is_sm3():
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    expected = reference(weight.detach(), grads((4, 3), 6), 0.1, 1e-8)
    optimizer = st.SparseSM3([weight], lr=0.1)
    for g in grads((4, 3), 6):
        weight.grad = g
        optimizer.step()
    assert torch.allclose(weight, expected, atol=1e-12)


def test_the_whole_matrix_selected_is_sm3():
    """Through the tuner: rows and columns of the weights, whatever the order of the slots."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    starts = [p.detach().clone() for p in model.parameters()]
    tuner = st.attach(model, st.random(1.0 - 1e-9))
    assert tuner.selected == 20
    (values,) = tuner.parameters()
    optimizer = st.SparseSM3([values], lr=0.1)
    for first, second in zip(grads((4, 3), 6), grads((2, 4), 6), strict=True):
        model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
        for page, g in zip(tuner.engine.ledger.pages, (first, second), strict=True):
            values.grad[page.slot] = g.flatten()[page.flat]
        optimizer.step()
        optimizer.zero_grad()
    weights = [model[0].weight, model[1].weight]
    expected = [reference(starts[0], grads((4, 3), 6), 0.1, 1e-8), reference(starts[1], grads((2, 4), 6), 0.1, 1e-8)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("kind", ["sm3", "adamw", "torch"])
def test_decay_pulls_towards_the_weight_at_selection(kind):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    tuner = st.attach(model, st.pafi(1))
    make = st.SparseSM3 if kind == "sm3" else st.SparseAdamW if kind == "adamw" else torch.optim.AdamW
    optimizer = make(tuner.parameters(), lr=0.1, weight_decay=0.5)
    moved = []
    for _ in range(2):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(model.weight.item())
    step = -0.1 / 2**0.5 if kind == "sm3" else -0.1
    assert moved[0] == pytest.approx(1.9, abs=1e-5)
    assert moved[1] == pytest.approx(1.9 + 0.05 * 0.1 + step, abs=1e-5)


def test_state_is_saved_and_loaded():
    def run(stop):
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        tuner = st.attach(model, st.random(7))
        optimizer = st.SparseSM3(tuner.parameters(), lr=0.1)
        for i in range(6):
            if i == stop:
                state = optimizer.state_dict()
                optimizer = st.SparseSM3(tuner.parameters(), lr=0.5)
                optimizer.load_state_dict(state)
            model(torch.randn(2, 3, generator=torch.Generator().manual_seed(i))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach().clone()

    assert torch.equal(run(3), run(None))


def test_values_that_make_no_sense_are_refused():
    values = [nn.Parameter(torch.zeros(2))]
    for wrong in ({"lr": -1.0}, {"eps": -1.0}, {"weight_decay": float("nan")}):
        with pytest.raises(st.errors.ConfigError, match="SparseSM3 takes"):
            st.SparseSM3(values, **wrong)
