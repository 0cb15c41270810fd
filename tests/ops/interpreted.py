"""The Triton kernels under the interpreter; run by test_triton.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from op_kit import FLOATS, check_sampled, products, same_bits, scored
from tolerances import close

from selectune import ops
from selectune.ops import backend, reference
from selectune.ops import triton as kernels
from selectune.ops.triton.language import interpreted


def test_the_interpreter_runs_and_is_chosen():
    assert interpreted()
    assert backend.find("score_filter", "cpu") is kernels.score_filter
    assert backend.find("sampled_matmul", "cpu") is kernels.sampled_matmul


@settings(max_examples=25)
@given(products(most=20, tokens=40), some.sampled_from([torch.int32, torch.int64]))
def test_sampled_matmul(case, width):
    dy, x, flat = case
    rows, cols = (flat // x.shape[1]).to(width), (flat % x.shape[1]).to(width)
    check_sampled(ops.sampled_matmul(dy, x, rows, cols), dy, x, flat)


@settings(max_examples=60)
@given(scored(longest=700))
def test_score_filter(case):
    got, wanted = ops.score_filter(*case), reference.score_filter(*case)
    assert torch.equal(got[0], wanted[0])
    assert same_bits(got[1], wanted[1])
    assert bool(got[2]) == bool(wanted[2])


def test_score_filter_by_any_power():
    weight, gradient = torch.randn(500), torch.randn(500)
    got, wanted = (way(weight, gradient, 0.7, 1.0, 0.0) for way in (ops.score_filter, reference.score_filter))
    assert torch.equal(got[0], wanted[0])
    close("score_filter, any power", got[1], wanted[1], torch.float32, wanted[1])


def test_score_filter_repeats_with_room_enough():
    weight, gradient = torch.zeros(20_000), torch.ones(20_000)  # more than the smallest buffer
    positions, _, finite = ops.score_filter(weight, gradient, 2.0, 1.0, 0.5)
    assert torch.equal(positions, torch.arange(20_000))
    assert finite


@settings(max_examples=40)
@given(products(dtypes=(torch.float32, torch.bfloat16, torch.float16), most=40, tokens=40), some.data())
def test_product_filter_misses_nothing(case, data):
    """Against scores in float64: all that reach the cutoff, and none that rounding could not have lifted there."""
    dy, x, _ = case
    exp = data.draw(some.sampled_from([0.0, 1.0, 2.0, 0.7, -1.0]))
    eps = data.draw(some.sampled_from([1.0, 1e-3, 0.0]))
    generator = torch.Generator().manual_seed(data.draw(some.integers(0, 99)))
    weight = torch.randn(dy.shape[1], x.shape[1], generator=generator) / 10
    dy, x = (part * (4 * torch.rand(part.shape[1], generator=generator) ** 6).to(part.dtype) for part in (dy, x))
    factor = (weight.double().abs() + eps) ** -exp
    score = ((dy.double().mT @ x.double()).abs() * factor).view(-1)
    off = (dy.double().norm(dim=0)[:, None] * x.double().norm(dim=0) * factor * (dy.shape[0] + 8) * 2.0**-21).view(-1)
    wanted = data.draw(some.integers(1, min(60, score.numel())))
    cutoff = score.topk(wanted).values[-1].float().clamp(min=1e-9)

    flat, gradient, count = kernels.product_filter(dy, x, weight, exp, eps, cutoff, room=2000)

    found = flat[: int(count)]
    assert found.unique().numel() == found.numel() == int(count)
    assert set((score >= float(cutoff)).nonzero()[:, 0].tolist()) <= set(found.tolist())
    assert bool((score[found] + off[found] >= float(cutoff) * (1 - 1e-4)).all())
    exact = (dy.double().mT @ x.double()).view(-1)[found]
    assert bool(((gradient[: int(count)] - exact).abs() * factor.view(-1)[found] <= off[found]).all())


def test_product_filter_tells_when_the_dense_product_is_the_way():
    dy, x, weight, cutoff = torch.ones(3, 40), torch.ones(3, 50), torch.zeros(40, 50), torch.tensor(2.0)
    flat, _, count = kernels.product_filter(dy, x, weight, 2.0, 1.0, cutoff, room=100)
    assert int(count) == 2000
    assert flat.unique().numel() == 100
    assert int(kernels.product_filter(dy, x, weight, 2.0, 1.0, torch.tensor(3.1), room=100)[2]) == 0
    dy[1, 7] = float("nan")
    assert int(kernels.product_filter(dy, x, weight, 2.0, 1.0, cutoff, room=3000)[2]) > 3000


@pytest.mark.parametrize("stored", FLOATS)
def test_scatter_values(stored):
    values = torch.cat((torch.randn(200), torch.tensor([0.0, -0.0, 65519.9, 65520.0, float("inf"), 1.00390625, 3e38])))
    slots, flat = torch.randperm(207), torch.randperm(300)[:207].sort().values
    got, wanted = torch.zeros(15, 20).to(stored), torch.zeros(15, 20).to(stored)
    ops.scatter_values(got, flat, values, slots)
    reference.scatter_values(wanted, flat, values, slots)
    assert same_bits(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aged", [False, True], ids=["shared", "entry"])
def test_adamw_step(dtype, aged):
    got = [torch.randn(150, dtype=dtype), torch.zeros(150, dtype=dtype), torch.zeros(150, dtype=dtype)]
    wanted = [part.clone() for part in got]
    ages = [torch.zeros(150, dtype=torch.int32) if aged else None for _ in range(2)]
    for step in range(1, 6):
        gradient = torch.randn(150, dtype=dtype) * (torch.rand(150) < 0.5)
        ops.adamw_step(got[0], gradient, *got[1:], ages[0], step=step, lr=0.01, betas=(0.9, 0.999), eps=1e-8,
                       weight_decay=0.1)  # fmt: skip
        reference.adamw_step(wanted[0], gradient, *wanted[1:], ages[1], step, 0.01, 0.9, 0.999, 1e-8, 0.1)
        for a, b in zip(got, wanted, strict=True):
            close("adamw_step", a, b, dtype, step * (b.abs() + 1))
        assert not aged or torch.equal(*ages)
