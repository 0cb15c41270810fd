"""Offsets: what is trained is how far a weight went; copies, averages and decay mean what they should."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

import selectune as st
from selectune.ops import bits
from selectune.scope import ScopedTensor
from selectune.train.support.ledger import Ledger

X = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(0))


class Lookahead(torch.optim.Optimizer):
    """Slow weights beside the fast ones, as schedule-free optimizers and MADGRAD keep a copy of the parameter."""

    def __init__(self, inner):
        self.inner, self.steps, self.slow = inner, 0, {}
        super().__init__(inner.param_groups[0]["params"], {})
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.slow.setdefault(p, p.detach().clone())
        self.inner.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for p in self.param_groups[0]["params"]:
                self.slow[p].lerp_(p, 0.5)
                p.copy_(self.slow[p])


def test_an_optimizer_that_copies_its_parameter_pulls_no_late_entry_away():
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    base = model.weight.detach().clone()
    tuner = st.attach(model, st.id3(budget=20, steps=4))
    optimizer = Lookahead(torch.optim.AdamW(tuner.parameters(), lr=1e-6, weight_decay=0))
    for step in range(4):
        model(X[step]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (model.weight.detach() - base).abs().max().item()
    assert 0 < moved < 1e-5
    assert (tuner.step, tuner.verify().selected) == (4, 20)


def test_an_average_of_offsets_is_one_of_weights():
    torch.manual_seed(0)
    model = nn.Linear(8, 8).double()
    tuner = st.attach(model, st.static_d3(budget=20))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    (offsets,) = tuner.parameters()
    seen, weights = [], []
    for step in range(4):
        model(X[step].double()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(offsets.detach().clone())
        weights.append(model.state_dict()["weight"].clone())
    offsets.data.copy_(torch.stack(seen).mean(0))
    with torch.no_grad():
        model(X[0].double())
    assert torch.allclose(model.weight.detach(), torch.stack(weights).mean(0), rtol=0, atol=1e-15)


def test_decay_of_any_optimizer_leaves_what_gets_no_gradient_where_it_was():
    """Layer norms at 1 stay at 1: decay pulls towards the weight at selection."""
    model = nn.LayerNorm(8)
    tuner = st.attach(model, st.magnitude(budget=8))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        (model(X[0]).sum() * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.weight.detach(), torch.ones(8))
    assert torch.equal(tuner.values, torch.ones(8))


def test_small_updates_of_large_weights_add_up():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1000.0)
    tuner = st.attach(model, st.pafi(1))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1e-5)
    for _ in range(100):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(1000 - 1e-3, abs=1e-4)


FLOATS = some.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None)
@given(
    pairs=some.lists(some.tuples(FLOATS, FLOATS), min_size=1, max_size=12),
    dtype=some.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_offsets_read_from_weights_give_these_weights_bit_for_bit(pairs, dtype):
    starts, wanted = (torch.tensor(column, dtype=torch.float64).to(dtype) for column in zip(*pairs, strict=True))
    weight = nn.Parameter(starts.clone(), requires_grad=False)
    ledger = Ledger([ScopedTensor(0, ("w",), weight)], len(pairs))
    ledger.add(torch.zeros(len(pairs), dtype=torch.int64), torch.arange(len(pairs)))
    ledger.write_weights()
    assert torch.equal(bits(weight), bits(starts))  # an offset of 0 is the weight itself, -0.0 too
    finite = torch.where(wanted.isfinite(), wanted, 0.0)
    weight.data.copy_(finite)
    ledger.read_weights()
    weight.data.zero_()
    ledger.write_weights()
    assert torch.equal(bits(weight), bits(finite))
    ledger.write_base()
    assert torch.equal(bits(weight), bits(starts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tuned_state_dict_of_the_run_comes_back(dtype):
    torch.manual_seed(0)
    model = nn.Linear(8, 8).to(dtype)
    tuner = st.attach(model, st.id3(budget=20, steps=2))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.3)
    kept = None
    for step in range(6):
        model(X[step].to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            kept = copy.deepcopy(model.state_dict())
    start = tuner.engine.ledger.start.clone()
    model.load_state_dict(kept)
    assert torch.equal(tuner.engine.ledger.start, start)  # an offset is found, so decay still pulls to where it did
    tuner.verify()
    with torch.no_grad():
        model(X[0].to(dtype))
    assert all(torch.equal(bits(now), bits(kept[name])) for name, now in model.state_dict().items())
