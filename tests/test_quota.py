"""Quotas: exact counts for any shares, and GEM's division by the entropy of values, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

import selectune as st
from selectune.quota import by_entropy, divided, entropy
from selectune.select import PerTensor


@given(some.lists(some.tuples(some.integers(0, 30), some.integers(0, 50)), min_size=1, max_size=8), some.floats(0, 1))
def test_any_shares_are_divided_exactly_and_no_tensor_gets_more_than_it_has(tensors, part):
    sizes, shares = [size for size, _ in tensors], [share for _, share in tensors]
    total = round(part * sum(sizes))
    counts = divided(total, sizes, shares)
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    open_ones = [j for j in range(len(sizes)) if counts[j] < sizes[j]]
    by_share = sorted(open_ones, key=lambda j: (shares[j], counts[j]))
    if any(shares[j] for j in open_ones):  # of those that are not whole, a larger share never gets less
        assert [counts[j] for j in by_share] == sorted(counts[j] for j in open_ones)
    assert divided(total, sizes, sizes) == divided(total, sizes)


def test_the_entropy_of_values():
    assert entropy(torch.arange(4.0)) == pytest.approx(math.log(4))  # four bins of one value each
    assert entropy(torch.arange(1024.0)) == pytest.approx(math.log(256))
    quarter = torch.tensor([-1.0, 5.0, 5.0, 5.0])
    assert entropy(quarter) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert entropy(quarter.bfloat16()) == entropy(quarter) == entropy(3 * quarter + 2)
    for constant in (torch.zeros(5), torch.empty(0), torch.tensor(2.0), torch.tensor([math.nan, 1.0])):
        assert entropy(constant) == 0.0
    assert by_entropy([torch.ones(9), torch.zeros(3)]) == [0, 0]


def test_gem_divides_by_entropy_and_takes_the_largest_ratios():
    """Entropies ln 2 and ln 4 nats of four values each, and their mean for one value: a budget of 9 is 3, 2 and 4.

    |g| / |w| decides within a tensor.
    """
    model = torch.nn.ParameterDict(
        {
            "ones": torch.nn.Parameter(torch.ones(4)),
            "pair": torch.nn.Parameter(torch.tensor([1.0, 2.0, 1.0, 2.0])),
            "four": torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0])),
        }
    )
    gradients = {"ones": [9.0, 8.0, 7.0, 9.0], "pair": [3.0, 4.0, 1.0, 8.0], "four": [0.1, 0.1, 0.1, 0.1]}
    tuner = st.attach(
        model,
        st.gem(9, batches=1),
        calibration=[gradients],
        loss=lambda model, batch: torch.stack([(torch.tensor(g) * model[n]).sum() for n, g in batch.items()]).sum(),
    )
    # ratios of "pair": 3, 2, 1, 4
    assert {n: f.tolist() for n, f in tuner.support.items()} == {
        "ones": [0, 1, 3],
        "pair": [0, 3],
        "four": [0, 1, 2, 3],
    }
    assert tuner.selected == 9


def test_gem_trains_an_adapter_that_begins_at_zero():
    """LoRA's B is all 0, and only B gets a gradient then."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 3, bias=False), torch.nn.Linear(3, 8, bias=False))
    torch.nn.init.zeros_(model[1].weight)
    x, y = torch.randn(16, 6), torch.randn(16, 8)
    tuner = st.attach(
        model, st.gem(20, batches=1), calibration=[x], loss=lambda model, batch: (model(batch) - y).square().mean()
    )
    assert tuner.support["1.weight"].numel() == 11  # 24 of 42 entries, of which the other 18 vary
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
    before = (model(x) - y).square().mean()
    before.backward()
    optimizer.step()
    assert (model(x) - y).square().mean() < before


def test_a_quota_reads_the_base_once_for_the_whole_run():
    """Training makes the constant tensor vary; the next selections are divided as the first one was."""
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(8)), "b": torch.nn.Parameter(torch.randn(8))})
    schedule = st.schedule.Increment(8, 4)
    tuner = st.attach(model, st.Method(score=st.scores.d3(), select=PerTensor("entropy"), schedule=schedule))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for _ in range(4):
        (model["a"].square().sum() + model["b"].square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {n: f.numel() for n, f in tuner.support.items()} == {"a": 4, "b": 4}


def test_an_unknown_quota_is_named():
    with pytest.raises(st.errors.ConfigError, match=r"Unknown quota 'rows'\. Known: size, entropy"):
        PerTensor("rows")
