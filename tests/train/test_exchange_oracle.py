"""Drop and grow against the rules written down once more, dense and slow: supports after every step, and values."""

from __future__ import annotations

import pytest
import torch
from exchange_kit import Oracle, growing
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

import selectune as st

SCORES = {"watch": st.scores.d3(exp=0.0), "gradient": st.scores.d3(exp=0.0), "factors": st.scores.row_times_column()}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Conv1d(1, 2, 3), nn.Flatten(0), nn.Linear(8, 3)).double()


def loss(net, x):
    return net[4](net[3](net[2](net[1](net[0](x))[None]))).square().sum()


def inputs(step, chunk):
    return torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * step + chunk))


@pytest.mark.parametrize("kind", SCORES)
@settings(max_examples=25, deadline=None)
@given(data=some.data())
def test_any_run(kind, data):
    every = data.draw(some.integers(1 if kind != "watch" else 2, 7))
    window = data.draw(some.integers(1, every - 1)) if kind == "watch" else 0
    fraction = data.draw(some.sampled_from([0.1, 0.34, 0.5, 1.0]))
    rate = data.draw(some.sampled_from(["linear", "cosine", "constant"]))
    budget = data.draw(some.integers(1, 60))
    chunks = data.draw(some.integers(1, 3))
    decay = data.draw(some.sampled_from([0.0, 0.5]))
    method = growing(
        SCORES[kind], budget, 14, every=every, window=window, fraction=fraction, decay=rate, regrow=kind != "factors"
    )
    net, dense = model(), model()
    tuner = st.attach(net, method, accumulation_steps=chunks, seed=data.draw(some.integers(0, 99)))
    if kind == "factors":
        optimizer = st.SparseSM3(tuner.parameters(), lr=0.05, weight_decay=decay)
    else:
        optimizer = st.SparseAdamW(tuner.parameters(), lr=0.05, weight_decay=decay, age="entry")
    names = [n for n, _ in dense.named_parameters()]
    support = [tuner.support.get(n, torch.empty(0)).tolist() for n in names]
    oracle = Oracle(dense, support, tuner.schedule, 0.05, decay, kind)

    def gradients(step, chunk):
        return [g.flatten().numpy() for g in torch.autograd.grad(loss(dense, inputs(step, chunk)), oracle.weights)]

    counts = [len(own) for own in support]
    for step in range(14):
        optimizer.zero_grad()
        for chunk in range(chunks):
            loss(net, inputs(step, chunk)).backward()
        optimizer.step()
        oracle.train([lambda s=step, c=chunk: gradients(s, c) for chunk in range(chunks)])
        now = [tuner.support.get(n, torch.empty(0)).tolist() for n in names]
        assert now == oracle.active, step
        assert [len(own) for own in now] == counts  # every tensor keeps its number of entries
        for weight, other in zip(oracle.weights, (p for n, p in net.named_parameters() if n in names), strict=True):
            assert torch.allclose(weight, other, rtol=1e-9, atol=1e-12), step
    assert tuner.verify().touched == budget
