"""A score, a schedule and a selection from outside the package plug in without touching it."""

from __future__ import annotations

import torch

import selectune as st
from selectune.schedule import Increment


@st.score(reads="gradient", above=0.0)
def taylor(weight, gradient):  # one function is the whole cost of a score
    return (weight * gradient).abs()


class Doubling:
    """1, 2, 4, ... entries until the budget: any object with the five members is a schedule."""

    keeps, steps = True, None

    def __init__(self, budget):
        self.budget = budget

    def resolve(self, eligible):
        return Doubling(min(self.budget, eligible))

    def due(self, step):
        return step < 10

    def target(self, step):
        return min(self.budget, 2**step)


class TopPerTensor:
    """The best entries of every tensor alone, an equal share each."""

    def collector(self, quota, sizes, seed):
        del seed
        return self.Collector(quota // len(sizes))

    class Collector:
        def __init__(self, share):
            self.share, self.rows = share, []

        def offer(self, tensor, flat, scores, carry=None):
            best = scores.topk(min(self.share, scores.numel())).indices
            where = best + flat if isinstance(flat, int) else flat[best]
            carry = scores if carry is None else carry
            self.rows += [(tensor, int(i), float(c)) for i, c in zip(where, carry[best], strict=True)]

        def close(self):
            tensors, flat, carried = zip(*self.rows, strict=True)
            return torch.tensor(tensors), torch.tensor(flat), torch.tensor(carried)


def train(method, count=6):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    tuner = st.attach(model, method)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    counts = []
    for _ in range(count):
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(tuner.selected)
    tuner.verify()
    return tuner, counts


def test_a_score():
    tuner, counts = train(st.Method(score=taylor(), schedule=Increment(12, 6)))
    assert counts == [2, 4, 6, 8, 10, 12]
    assert tuner.delta().info["method"]["score"] == {"name": "taylor"}


@st.score(reads="pooled")
def distance(weight, gradient, batches=2):  # the parameter `batches` is read by the engine
    return (gradient - weight).abs()


def test_a_score_that_is_calibrated():
    model = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 5.0, 2.0]]))
    data = [torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 3.0, 9.0]]), torch.tensor([[99.0, 0.0, 0.0]])]
    method = st.Method(score=distance(), schedule=st.schedule.OneShot(1))
    tuner = st.attach(model, method, calibration=data, loss=lambda m, x: m(x).sum())
    assert tuner.support["weight"].tolist() == [2]  # |g - w| = [0, 0, 7] over the first two batches


def test_a_schedule():
    _, counts = train(st.Method(score=st.scores.d3(), schedule=Doubling(20)))
    assert counts == [1, 2, 4, 8, 16, 20]


def test_a_selection():
    tuner, counts = train(
        st.Method(score=st.scores.magnitude(), select=TopPerTensor(), schedule=st.schedule.OneShot(16))
    )
    assert counts[-1] == 16
    assert {n: len(f) for n, f in tuner.support.items()} == {"0.weight": 4, "0.bias": 4, "2.weight": 4, "2.bias": 4}
    tuner, _ = train(st.Method(score=st.scores.d3(), select=TopPerTensor(), schedule=st.schedule.OneShot(16)))
    assert {len(f) for f in tuner.support.values()} == {4}
