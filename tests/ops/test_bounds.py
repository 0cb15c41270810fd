"""Bounds on a weight gradient: no entry that reaches the cutoff is dismissed, and exact sums depend on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from selectune import internals
from selectune.ops import bounds
from selectune.ops.bounds import Factors, Weighting, above


def exact_product(q, p, out):
    return out.copy_((q.double() @ p.double()).to(torch.int32))


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """Bounds are tried wherever they could be, also on a processor whose products of int8 are slow or saturate."""
    if not internals.fast_int8():
        monkeypatch.setattr(internals, "int8_product", exact_product)
    monkeypatch.setattr(bounds, "pays", lambda *given: True)


@some.composite
def gradients(draw):
    t, o, i = (draw(some.integers(1, most)) for most in (40, 70, 200))
    generator = torch.Generator().manual_seed(draw(some.integers(0, 1 << 30)))
    spread, size = draw(some.sampled_from([0.0, 1.0, 3.0])), 10.0 ** draw(some.integers(-21, 6))
    dy, x = (
        torch.randn(t, n, generator=generator) * torch.exp(spread * torch.randn(n, generator=generator)) * size
        for n in (o, i)
    )
    if draw(some.booleans()):
        dy[:, 0], x[:, -1] = 0.0, 0.0
    weight = torch.randn(o, i, generator=generator) * draw(some.sampled_from([0.0, 0.05, 3.0]))
    return dy, x, weight.to(draw(some.sampled_from([torch.float32, torch.bfloat16])))


WEIGHTINGS = {
    "|g|": lambda size: size.pow(0.0),
    "1 / (|w| + 0.001)": lambda size: 1 / (size + 1e-3),
    "(|w| + 1)^-2": lambda size: (size + 1) ** -2,
    "(|w| + 1e-8)^-0.7": lambda size: (size + 1e-8) ** -0.7,
    "1 / |w|": lambda size: 1 / size,
    "|w|": lambda size: size,
    "(|w| + 0.1)^3": lambda size: (size + 0.1) ** 3,
    "exp(-|w|)": lambda size: torch.exp(-size),
}


def scores_of(dy, x, weight, weighting):
    gradient = (dy.double().mT @ x.double()).abs()
    return torch.where(gradient > 0, gradient * weighting(weight.double().abs()), 0.0).view(-1)


@settings(max_examples=250)
@given(gradients(), some.sampled_from(list(WEIGHTINGS)), some.integers(1, 60),
       some.sampled_from(["norms", "int8", "both", "no cutoff"]), some.integers(0, 1 << 20))  # fmt: skip
def test_nothing_that_reaches_the_cutoff_is_dismissed(case, name, rank, way, seed):
    (dy, x, weight), weighting = case, WEIGHTINGS[name]
    scores = scores_of(dy, x, weight, weighting)
    barred = torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(seed))[: scores.numel() // 3]
    if way == "no cutoff":
        scores[barred] = -1.0
    rank = min(rank, scores.numel())
    cutoff = float(scores.topk(rank).values[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "SHARE", 1.0)
        patch.setattr(bounds, "FEWEST", 1)
        if way == "norms":
            patch.setattr(bounds, "EXACT", 0.0001)  # all that the norms leave
        elif way == "int8":
            patch.setattr(bounds, "_by_norms", lambda *given: None)
        given = (-math.inf, rank, barred) if way == "no cutoff" else (cutoff,)
        groups = -(-weight.shape[1] // 16) * weight.shape[0]
        if way == "no cutoff" and rank > groups:
            return
        found = above(Factors(dy, x), weight, Weighting(weighting), *given)
    if cutoff <= 0 or cutoff == math.inf:
        assert found is None
    elif found is not None:
        assert torch.equal(found, torch.unique(found))
        wanted = (scores >= cutoff * (1 + 1e-9)).nonzero().squeeze(1)
        assert torch.isin(wanted, found).all()


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_a_factor_lies_between_its_bounds(name):
    weight = torch.cat((torch.randn(4000) * torch.logspace(-30, 20, 4000), torch.tensor([0.0, 1e-45, -3.4e38])))
    weighting = Weighting(WEIGHTINGS[name])
    bins = (weight.view(torch.int32) & 0x7FFFFFFF).long() >> bounds.SHIFT
    true = weighting(weight)
    assert (weighting.least[bins] <= true).all()
    assert (true <= weighting.most[bins]).all()
    assert float(true.max()) <= weighting.top(weight)
    special = (torch.tensor([math.inf, math.nan]).view(torch.int32) >> bounds.SHIFT).long()
    assert weighting.most[special].tolist() == [math.inf, math.inf]
    assert weighting.least[special].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", list(WEIGHTINGS))
@pytest.mark.parametrize("known", [True, False])
def test_few_candidates_are_left(name, known):
    """Not only right but of use: heavy-tailed columns, as gradients have."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (
        torch.randn(256, n, generator=generator) * torch.exp(torch.randn(n, generator=generator)) for n in (192, 320)
    )
    weight, weighting = torch.randn(192, 320, generator=generator) * 0.05, WEIGHTINGS[name]
    cutoff = float(scores_of(dy, x, weight, weighting).topk(20).values[-1]) if known else -math.inf
    found = above(Factors(dy, x), weight, Weighting(weighting), cutoff, 20)
    assert found is not None
    assert 20 <= found.numel() <= 300


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_not_finite_go_the_dense_way(bad):
    dy, x = torch.randn(8, 20), torch.randn(8, 30)
    dy[3, 7] = bad
    assert above(Factors(dy, x), torch.zeros(20, 30), Weighting(WEIGHTINGS["(|w| + 1)^-2"]), 0.5) is None


@pytest.mark.parametrize("size", [1e-12, 1e-16, 1e-18, 1e-20, 1e-22])
def test_numbers_that_are_tiny_are_not_lost(size, monkeypatch):
    """Products of scales leave float32 long before the numbers do."""
    monkeypatch.setattr(bounds, "_by_norms", lambda *given: None)
    dy, x, weight = torch.randn(30, 20) * size, torch.randn(30, 30) * size, torch.zeros(20, 30)
    weighting = WEIGHTINGS["(|w| + 1)^-2"]
    scores = scores_of(dy, x, weight, weighting)
    found = above(Factors(dy, x), weight, Weighting(weighting), float(scores.topk(3).values[-1]))
    assert (found is None) == (size < 1e-12)
    assert found is None or torch.isin(scores.topk(3).indices, found).all()


@pytest.mark.parametrize("strided", [False, True])
def test_exact_sums_are_those_of_a_plain_loop(strided, monkeypatch):
    """Bit for bit, on any number of threads, and by plain torch."""
    dy, x = torch.randn(133, 17), torch.randn(133, 29)
    if strided:
        dy, x = dy.T.contiguous().T, torch.randn(133, 58)[:, ::2]
    flat = torch.randperm(17 * 29)[:211].sort().values
    left, right = dy.numpy().astype(np.float64), x.numpy().astype(np.float64)
    total = np.zeros(flat.numel())
    for token in range(133):
        total += left[token, flat.numpy() // 29] * right[token, flat.numpy() % 29]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = Factors(dy, x).exact(flat)
        torch.set_num_threads(1)
        assert torch.equal(got, torch.from_numpy(total))
    monkeypatch.setenv("SELECTUNE_BACKEND", "reference")
    assert torch.equal(Factors(dy, x).exact(flat), torch.from_numpy(total))


def test_products_of_int8_are_exact_where_they_are_used():
    if not internals.fast_int8():
        pytest.skip("this processor has no fast products of int8, so the engine does not use them here")
    for t, o, i in ((1, 2, 1), (2, 2, 2), (5, 3, 7), (17, 33, 40), (300, 40, 70), (64, 128, 5)):
        q, p = (torch.randint(-127, 128, (t, n), dtype=torch.int8) for n in (o, i))
        q[:, 0], p[:, -1] = 127, -127  # the largest sums
        out = torch.empty(o, i, dtype=torch.int32)
        assert torch.equal(internals.int8_product(q.t(), p, out=out), exact_product(q.t(), p, torch.empty_like(out)))
