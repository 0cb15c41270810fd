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
