"""SparseAdamW: torch's AdamW with a shared age, its own bias correction per entry with age="entry"."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from selectune.errors import ConfigError
from selectune.train.optim.adamw import SparseAdamW


def test_the_published_first_step_of_a_late_entry():
    """Entry 0 sees g = 5 for 1000 steps, entry 1 first g = 1 at the 1000th: -0.25146 shared, -0.1000 on its own."""
    for age, first_step in (("shared", -0.25146), ("entry", -0.1000)):
        values = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = SparseAdamW([values], lr=0.1, eps=1e-300, weight_decay=0.0, age=age)
        for step in range(1000):
            values.grad = torch.tensor([5.0, 1.0 if step == 999 else 0.0], dtype=torch.float64)
            optimizer.step()
        assert round(values[1].item(), 5) == pytest.approx(first_step, abs=1e-5)
        assert values[0].item() == pytest.approx(-100.0)


def run(optimizer, values, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        values.grad = torch.randn(values.shape, generator=g).to(values.dtype)
        optimizer.step()
    return values.detach().clone()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (33_000,), (30, 7)])
def test_a_shared_age_is_torchs_adamw(shape, dtype, weight_decay):
    start = torch.randn(shape, dtype=dtype)
    ends = []
    for kind in (SparseAdamW, torch.optim.AdamW):
        values = nn.Parameter(start.clone())
        ends.append(run(kind([values], lr=0.01, weight_decay=weight_decay), values, 50))
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    assert torch.allclose(*ends, rtol=tolerance, atol=tolerance)


def test_with_every_gradient_from_the_start_both_ages_are_one():
    ends = []
    for age in ("shared", "entry"):
        values = nn.Parameter(torch.ones(1000))
        ends.append(run(SparseAdamW([values], lr=0.01, age=age), values, 30))
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("age", ["shared", "entry"])
def test_threads_and_repetition_change_no_bit(age):
    ends = []
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        values = nn.Parameter(torch.randn(50_000))
        ends.append(run(SparseAdamW([values], lr=0.01, age=age), values, 5))
    torch.set_num_threads(1)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_an_entry_without_gradient_waits_untouched():
    values = nn.Parameter(torch.full((3,), 7.0))
    optimizer = SparseAdamW([values], lr=0.1, weight_decay=0.5, age="entry")
    for _ in range(4):
        values.grad = torch.tensor([1.0, 0.0, 0.0])
        optimizer.step()
    assert values[1:].tolist() == [7.0, 7.0]
    assert optimizer.state[values]["age"].tolist() == [4, 0, 0]
    values.grad = torch.tensor([0.0, 1.0, 0.0])
    optimizer.step()
    assert optimizer.state[values]["age"].tolist() == [5, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("age", ["shared", "entry"])
def test_a_state_dict_taken_mid_run_continues_bit_for_bit(tmp_path, age, dtype):
    values = nn.Parameter(torch.randn(500).to(dtype))
    optimizer = SparseAdamW([values], lr=0.01, age=age)
    run(optimizer, values, 7)
    kept = copy.deepcopy(optimizer.state_dict())
    file = tmp_path / "optimizer.pt"
    torch.save(kept, file)
    again = nn.Parameter(values.detach().clone())
    other = SparseAdamW([again], lr=0.5, age=age)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(optimizer, values, 7, seed=1), run(other, again, 7, seed=1))
    if age == "entry":
        assert other.state[again]["age"].dtype == torch.int32
    assert other.state[again]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("age", ["shared", "entry"])
def test_it_converges(age):
    goal = torch.randn(200)
    values = nn.Parameter(torch.zeros(200))
    optimizer = SparseAdamW([values], lr=0.05, weight_decay=0.0, age=age)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (values - goal).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_what_torchs_tools_expect_of_an_optimizer():
    values, head = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 3).mT)
    optimizer = SparseAdamW([{"params": [values]}, {"params": [head], "lr": 1.0}], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)

    def closure():
        optimizer.zero_grad()
        loss = (values - 1).square().sum() + (head - 1).square().sum()
        loss.backward()
        return loss

    before = values._version
    assert optimizer.step(closure).item() == 10.0
    assert values._version > before
    assert torch.allclose(values.detach(), torch.full((4,), 0.05), rtol=1e-4)
    assert torch.allclose(head.detach(), torch.full((3, 2), 0.5), rtol=1e-4)
    schedule.step()
    values.grad = None
    optimizer.step()  # a parameter without gradient stays
    assert torch.allclose(values.detach(), torch.full((4,), 0.05), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"lr": -1.0}, "lr=-1.0"), ({"betas": (1.0, 0.9)}, "betas"), ({"eps": -1.0}, "eps"),
     ({"weight_decay": -0.1}, "weight_decay"), ({"age": "own"}, "shared, entry")],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        SparseAdamW([nn.Parameter(torch.zeros(1))], **options)
