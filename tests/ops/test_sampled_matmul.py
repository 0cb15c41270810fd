"""The gradient at the support, every way on the CPU, against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from op_kit import check_sampled, products

from selectune import ops
from selectune.errors import ConfigError
from selectune.ops import backend, reference
from selectune.ops.cpu import kernels as cpu
from selectune.ops.cpu.threads import launch

WAYS = {"reference": reference.sampled_matmul, "tiles": cpu.tiles, "dense": backend.dense, "chosen": ops.sampled_matmul}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60)
@given(case=products())
def test_every_way_gives_the_gradient_at_the_support(way, case):
    dy, x, flat = case
    check_sampled(WAYS[way](dy, x, flat // x.shape[1], flat % x.shape[1]), *case)


@settings(max_examples=60)
@given(products(dtypes=(torch.float32, torch.float64)))
def test_the_plain_loop_gives_the_gradient_at_the_support(case):
    dy, x, flat = case
    check_sampled(cpu.gather(dy, x, flat // x.shape[1], flat % x.shape[1]), *case)


@settings(max_examples=30)
@given(products(dtypes=(torch.float32,)), some.sampled_from([torch.int32, torch.int64]))
def test_indices_of_either_width_in_any_order(case, width):
    dy, x, flat = case
    flat = flat[torch.randperm(flat.numel())]
    for way in (cpu.tiles, cpu.gather, ops.sampled_matmul):
        check_sampled(way(dy, x, (flat // x.shape[1]).to(width), (flat % x.shape[1]).to(width)), dy, x, flat)


@pytest.mark.parametrize("way", [cpu.tiles, cpu.gather])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_threads_changes_no_bit(way, dtype):
    dy, x = torch.randn(300, 2000, dtype=dtype), torch.randn(300, 70, dtype=dtype)  # three bands of rows
    flat = torch.randperm(2000 * 70)[:3000].sort().values
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(way(dy, x, flat // 70, flat % 70))
    torch.set_num_threads(1)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_without_torchs_openmp_ordinary_threads_do_the_work(monkeypatch):
    from selectune.ops.cpu import threads

    dy, x, flat = torch.randn(200, 100), torch.randn(200, 50), torch.arange(0, 5000, 3)
    wanted = cpu.tiles(dy, x, flat // 50, flat % 50)
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    torch.set_num_threads(3)
    try:
        assert torch.equal(cpu.tiles(dy, x, flat // 50, flat % 50), wanted)
    finally:
        torch.set_num_threads(1)


def test_what_threads_have_turned_is_bounded(monkeypatch):
    dy, x, flat = torch.randn(700, 40), torch.randn(700, 30), torch.arange(0, 1200, 7)
    torch.set_num_threads(3)
    try:
        wanted, asked = cpu.tiles(dy, x, flat // 30, flat % 30), []
        monkeypatch.setattr(
            cpu, "launch", lambda loop, given, blocks: asked.append(blocks) or launch(loop, given, blocks)
        )
        monkeypatch.setattr(cpu, "DESKS", 1)
        assert torch.equal(cpu.tiles(dy, x, flat // 30, flat % 30), wanted)
    finally:
        torch.set_num_threads(1)
    assert asked[0] == 1  # one thread at a time
    check_sampled(wanted, dy, x, flat)


def test_entries_are_looked_at_again_once_they_change():
    dy, x = torch.randn(90, 8), torch.randn(90, 8)
    rows, cols = torch.arange(8, dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    for _ in range(2):
        check_sampled(cpu.tiles(dy, x, rows, cols), dy, x, 9 * torch.arange(8))
    check_sampled(cpu.tiles(dy, x, rows, cols.flip(0)), dy, x, 7 * torch.arange(1, 9))
    rows.copy_(rows.flip(0))  # descending: no longer as they are kept
    check_sampled(cpu.tiles(dy, x, rows, cols), dy, x, 56 - 7 * torch.arange(8))
    cols[0] = 8
    with pytest.raises(ConfigError, match="out of range"):
        cpu.tiles(dy, x, rows, cols)


def test_entries_are_not_kept_longer_than_their_owner_keeps_them():
    rows = torch.arange(8, dtype=torch.int32)
    before = len(cpu._starts)
    cpu.tiles(torch.randn(90, 8), torch.randn(90, 8), rows, rows.clone())
    assert len(cpu._starts) == before + 1
    del rows
    assert len(cpu._starts) == before


def test_strided_operands():
    dy, x = torch.randn(30, 150).mT, torch.randn(150, 64)[:, ::2]
    flat = torch.arange(0, 30 * 32, 5)
    for way in (cpu.tiles, cpu.gather, ops.sampled_matmul):
        check_sampled(way(dy, x, flat // 32, flat % 32), dy, x, flat)
    dy, x = torch.randn(150, 90)[:, 10:40], torch.randn(150, 64)[:, 32:]
    for way in (cpu.tiles, cpu.gather, ops.sampled_matmul):
        check_sampled(way(dy, x, flat // 32, flat % 32), dy, x, flat)


def test_operands_of_two_dtypes_meet_in_the_wider_one():
    dy, x, flat = torch.randn(9, 4).bfloat16(), torch.randn(9, 5), torch.arange(20)
    check_sampled(ops.sampled_matmul(dy, x, flat // 5, flat % 5), dy.float(), x, flat)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(special):
    dy, x, flat = torch.randn(140, 40), torch.randn(140, 33), torch.arange(40 * 33)
    dy[135, 7] = special
    for way in (cpu.tiles, cpu.gather):
        finite = way(dy, x, flat // 33, flat % 33).isfinite().view(40, 33)
        assert not finite[7].any()
        assert finite[[r for r in range(40) if r != 7]].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_through_the_op_are_those_of_the_reference(dtype):
    flat = torch.arange(0, 42, 5)
    leaves = [torch.randn(9, n, dtype=dtype, requires_grad=True) for n in (6, 7)]
    found = []
    for way in (ops.sampled_matmul, lambda dy, x, r, c: (dy[:, r] * x[:, c]).sum(0)):
        out = way(*leaves, flat // 7, flat % 7)
        found.append(torch.autograd.grad((out * torch.arange(9.0, dtype=dtype)).sum(), leaves))
    for got, wanted in zip(*found, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dy": torch.zeros(3, 4, 5)}, "same t"),
        ({"x": torch.zeros(4, 5)}, "same t"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, "rows .k,. and cols .k,."),
        ({"rows": torch.zeros(1)}, "int32 or int64"),
        ({"x": torch.zeros(3, 5, dtype=torch.int64)}, "float32, float64, bfloat16 or float16"),
        ({"rows": torch.tensor([4])}, "out of range"),
        ({"cols": torch.tensor([-1])}, "out of range"),
    ],
    ids=["3-d", "tokens", "lengths", "index dtype", "operand dtype", "row", "column"],
)
def test_arguments_that_do_not_fit_are_refused(change, says, monkeypatch):
    monkeypatch.setenv("SELECTUNE_BACKEND", "numba")
    fine = {"dy": torch.zeros(3, 4), "x": torch.zeros(3, 5), "rows": torch.tensor([0]), "cols": torch.tensor([0])}
    with pytest.raises(ConfigError, match=says):
        ops.sampled_matmul(**(fine | change))
