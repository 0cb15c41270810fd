"""One-pass ops on the CPU: scoring with a cutoff, scattering, the Adam step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from op_kit import FLOATS, same_bits, scored
from tolerances import close

from selectune import bits, ops
from selectune.errors import ConfigError
from selectune.ops import reference
from selectune.ops.cpu import kernels as cpu
from selectune.scores import d3, pafi


@settings(max_examples=200)
@given(scored())
def test_scores_are_those_of_the_score_function_bit_for_bit(case):
    weight, gradient, exp, eps, cutoff = case
    wide = bits.wide(weight.dtype)
    scores = d3(exp=exp, eps=eps)(weight.to(wide), gradient.to(wide))
    wanted = ((scores.double() >= cutoff) & (scores > 0)).nonzero().squeeze(1)
    for way in (ops.score_filter, reference.score_filter):
        positions, kept, finite = way(weight, gradient, exp, eps, cutoff)
        assert torch.equal(positions, wanted)
        assert same_bits(kept, scores[wanted])
        assert bool(finite) == bool(torch.isfinite(scores).all())


@settings(max_examples=200)
@given(scored())
def test_the_smallest_weights_are_those_of_the_score_bit_for_bit(case):
    weight, _, _, _, cutoff = case
    scores = pafi()(weight.to(bits.wide(weight.dtype)))
    for bound in (-cutoff, cutoff, float(scores.nan_to_num().median()) if len(scores) else 0.0):
        wanted = (scores.double() >= bound).nonzero().squeeze(1)
        for way in (ops.small_filter, reference.small_filter):
            positions, kept, finite = way(weight, bound)
            assert torch.equal(positions, wanted)
            assert same_bits(kept, scores[wanted])
            if bound > float("-inf"):
                assert bool(finite) == bool(torch.isfinite(scores).all())


def test_a_cutoff_equal_to_a_score_keeps_it():
    weight, gradient = torch.randn(5000), torch.randn(5000)
    scores = d3(exp=2.0, eps=1.0)(weight, gradient)
    for rank in (1, 10, 100, 4000):
        cutoff = float(scores.sort(descending=True).values[rank - 1])
        assert ops.score_filter(weight, gradient, 2.0, 1.0, cutoff)[0].numel() == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exp", [0.5, 3.0, -1.0])
def test_any_other_power(dtype, exp):
    weight, gradient = torch.randn(5000, dtype=dtype), torch.randn(5000, dtype=dtype)
    got, wanted = (way(weight, gradient, exp, 1.0, float("-inf")) for way in (ops.score_filter, reference.score_filter))
    assert torch.equal(got[0], wanted[0])
    close("score_filter, any power", got[1], wanted[1], dtype, wanted[1])


def test_more_candidates_than_the_stage_holds():
    weight, gradient = torch.zeros(100_000), torch.ones(100_000)
    gradient[50_000:] = 2.0
    for cutoff, count in ((0.5, 100_000), (1.5, 50_000), (2.0, 50_000), (2.5, 0)):
        positions, scores, finite = ops.score_filter(weight, gradient, 2.0, 1.0, cutoff)
        assert torch.equal(positions, torch.arange(100_000 - count, 100_000))
        assert torch.equal(scores, gradient[positions])
        assert finite


def test_threads_change_no_score_and_no_order():
    weight, gradient = torch.randn(200_000), torch.randn(200_000)
    answers = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        answers.append(ops.score_filter(weight, gradient, 2.0, 1.0, 1.0))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_a_cutoff_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="NaN"):
        ops.score_filter(torch.zeros(1), torch.zeros(1), 2.0, 1.0, float("nan"))


SPECIAL = [0.0, -0.0, 1.0, 65504.0, 65519.99, 65520.0, 1e6, float("inf"), -float("inf"), 6e-8, 2.9e-8, 2.99e-8, 6.1e-5,
           1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11, 3.39e38, 1e-45, -1e-40]  # fmt: skip


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("held", [torch.float32, torch.float64])
def test_values_are_rounded_as_torch_casts_them(stored, held):
    generator = torch.Generator().manual_seed(1)
    ladder = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).to(held)
    ladder = ladder[ladder.isfinite()]
    middle = (ladder[1:] + ladder[:-1]) / 2  # ties between neighbours
    noise = torch.randn(1000, generator=generator).to(held) * torch.logspace(-9, 6, 1000, dtype=held)
    values = torch.cat((torch.tensor(SPECIAL, dtype=held), ladder, middle, noise))
    slots = torch.randperm(values.numel(), generator=generator)
    flat = torch.randperm(values.numel() + 77, generator=generator)[: values.numel()].sort().values
    got = torch.full((values.numel() + 77,), 5.0).to(stored)
    wanted = got.clone()
    ops.scatter_values(got, flat, values, slots)
    wanted[flat] = values[slots].to(stored)
    assert same_bits(got, wanted)
    ops.scatter_values(got, flat[:1], torch.tensor([float("nan")], dtype=held), torch.tensor([0]))
    assert got[flat[0]].isnan()


def test_scattering_into_any_strides_and_nothing():
    weight = torch.zeros(6, 4).mT
    ops.scatter_values(weight, torch.tensor([1, 23]), torch.tensor([7.0, 9.0]), torch.tensor([1, 0]))
    assert weight.reshape(-1)[[1, 23]].tolist() == [9.0, 7.0]
    ops.scatter_values(weight, torch.empty(0, dtype=torch.int64), torch.zeros(0), torch.empty(0, dtype=torch.int64))
    assert weight.count_nonzero() == 2


def test_scattering_tells_autograd_that_the_weight_changed():
    weight = torch.nn.Parameter(torch.zeros(4))
    before = weight._version
    ops.scatter_values(weight, torch.tensor([1]), torch.ones(1), torch.tensor([0]))
    assert weight._version > before


@pytest.mark.parametrize("held", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["numba", "reference"])
def test_many_weights_at_once_are_each_as_alone(monkeypatch, name, held):
    monkeypatch.setenv("SELECTUNE_BACKEND", name)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(500, generator=generator, dtype=held)
    shapes = [(40, 3), (1,), (0,), (7, 9, 2), (30,)]
    weights = [torch.zeros(shape, dtype=dtype) for shape in shapes for dtype in FLOATS] + [torch.zeros(6, 4).mT]
    counts = [w.numel() // 2 for w in weights]
    flats = [torch.randperm(w.numel())[:n].sort().values for w, n in zip(weights, counts, strict=True)]
    slots = [torch.randint(0, 500, (n,), generator=generator) for n in counts]
    slots[-1] = slots[-1].int()
    wanted = [w.clone() for w in weights]
    before = [w._version for w in weights]
    for weight, flat, slot in zip(wanted, flats, slots, strict=True):
        ops.scatter_values(weight, flat, values, slot)
    ops.scatter_many(weights, flats, values, slots)
    assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))
    assert all(w._version > b for w, b, n in zip(weights, before, counts, strict=True) if n)


def test_many_weights_refuse_indices_out_of_range():
    weights = [torch.zeros(4), torch.zeros(4)]
    one, two = torch.tensor([1]), torch.tensor([2])
    with pytest.raises(ConfigError, match="out of range"):
        ops.scatter_many(weights, [one, one], torch.ones(2), [one, two])
    assert weights[1].count_nonzero() == 0


@pytest.mark.parametrize(("flat", "slots"), [([4], [0]), ([-1], [0]), ([0], [2]), ([0], [-1])])
def test_indices_out_of_range_write_nothing_elsewhere(flat, slots):
    weight = torch.zeros(4)
    with pytest.raises(ConfigError, match="out of range"):
        ops.scatter_values(weight, torch.tensor(flat), torch.ones(2), torch.tensor(slots))
    assert weight.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aged", [False, True], ids=["shared", "entry"])
def test_the_adam_step_is_the_references(dtype, aged):
    n = 40_000
    got = [torch.randn(n, dtype=dtype), torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype)]
    wanted = [part.clone() for part in got]
    ages = [torch.zeros(n, dtype=torch.int32) if aged else None for _ in range(2)]
    for step in range(1, 8):
        gradient = torch.randn(n, dtype=dtype) * (torch.rand(n) < 0.5)
        numbers = (step, 0.01, 0.9, 0.999, 1e-8, 0.1)
        cpu.adamw_step(got[0], gradient, *got[1:], ages[0], *numbers)
        reference.adamw_step(wanted[0], gradient, *wanted[1:], ages[1], *numbers)
        for a, b in zip(got, wanted, strict=True):
            close("adamw_step", a, b, dtype, step * (b.abs() + 1))
        assert not aged or torch.equal(*ages)
