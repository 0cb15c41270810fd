"""Invariants over generated runs: budget, untouched bits, growth, exact restoration, under any optimizer."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn
from train_kit import Mixed, bits, changed, mixed_loss, same, tokens

import selectune as st

RUNS = int(os.environ.get("RUNS", "120"))  # 1000 in the long form
OPTIMIZERS = {
    "AdamW, default decay": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, heavy decay, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD, momentum and decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}  # fmt: skip


@some.composite
def runs(draw):
    steps = draw(some.integers(1, 6))
    budget = draw(some.one_of(some.integers(1, 8), some.integers(9, 900), some.just(1.0)))
    kind = draw(some.sampled_from(["id3", "static_d3", "increment_pafi", "pafi", "random", "repeat_d3"]))
    arguments = {}
    if kind in ("id3", "increment_pafi", "repeat_d3"):
        arguments = {"steps": draw(some.integers(1, 8)), "every": draw(some.integers(1, 3))}
    if kind in ("id3", "static_d3"):
        arguments |= {
            "exp": draw(some.sampled_from([-1.0, 0.0, 1.0, 2.0])),
            "eps": draw(some.sampled_from([0.01, 1.0])),
        }
    return {
        "kind": kind,
        "arguments": arguments,
        "budget": budget,
        "steps": steps,
        "seed": draw(some.integers(0, 1000)),
        "optimizer": draw(some.sampled_from(sorted(OPTIMIZERS))),
        "dtype": draw(some.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "accumulation": draw(some.integers(1, 2)),
        "clip": draw(some.booleans()),
        "skips": draw(some.sets(some.integers(0, 5), max_size=2)),
        "head": draw(some.booleans()),
    }


@settings(max_examples=RUNS)
@given(runs())
def test_budget_and_bits(run):
    """I1-I4, I6, I7, I9: at most B differ, all else keeps its bits, supports grow, detach restores every byte."""
    torch.manual_seed(run["seed"])
    model = Mixed(run["dtype"])
    base = bits(model)
    dense = "norm.*" if run["head"] else ()
    scope = st.Scope(train_fully=dense)
    eligible = scope.find(model).eligible
    budget = eligible if run["budget"] == 1.0 else min(run["budget"], eligible)
    method = getattr(st, run["kind"])(budget, scope=scope, **run["arguments"])
    tuner = st.attach(model, method, seed=run["seed"], accumulation_steps=run["accumulation"])
    optimizer = OPTIMIZERS[run["optimizer"]](tuner.parameters())
    before: dict[str, set[int]] = {}
    for step in range(run["steps"]):
        optimizer.zero_grad()
        at = bits(model)
        for part in range(run["accumulation"]):
            mixed_loss(model, tokens(step * 7 + part)).backward()
        if run["clip"]:
            nn.utils.clip_grad_norm_(tuner.parameters(), 0.5)
        if step in run["skips"]:
            assert same(bits(model), at)
            continue
        optimizer.step()
        support = {n: set(f.tolist()) for n, f in tuner.support.items()}
        moved = {n: w for n, w in changed(base, bits(model)).items() if not (run["head"] and n.startswith("norm"))}
        assert tuner.selected == sum(map(len, support.values())) <= budget
        if run["kind"] == "repeat_d3":
            assert sum(map(len, moved.values())) <= tuner.touched
        else:
            assert all(where <= support[n] for n, where in moved.items())
            assert all(where <= support[n] for n, where in before.items())
            before = support
    assert tuner.verify().changed == sum(map(len, moved.values())) if run["steps"] > len(run["skips"]) else True
    delta = tuner.delta(allow_empty=True)
    tuned = bits(model)
    tuner.detach()
    assert same(bits(model), base)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    delta.apply(model)
    assert same(bits(model), tuned)
    delta.revert(model)
    assert same(bits(model), base)


@settings(max_examples=RUNS // 4)
@given(some.integers(-20, 20), some.integers(0, 100))
def test_scaling_the_loss_by_a_power_of_two_selects_the_same(power, seed):
    def support(scale):
        torch.manual_seed(seed)
        model = Mixed()
        tuner = st.attach(model, st.id3(50, 2))
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.0)
        for i in range(2):
            (mixed_loss(model, tokens(i)) * scale).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {n: f.tolist() for n, f in tuner.support.items()}

    assert support(2.0**power) == support(1.0)


@settings(max_examples=20)
@given(some.integers(0, 100), some.sampled_from([1, 7, 64, 1 << 20]))
def test_the_size_of_a_scanned_piece_changes_nothing(seed, piece):
    from selectune.train.choose import scan

    def support():
        torch.manual_seed(seed)
        model = Mixed()
        tuner = st.attach(model, st.id3(50, 2))
        mixed_loss(model, tokens(seed)).backward()
        return {n: f.tolist() for n, f in tuner.support.items()}

    expected, before = support(), scan.PIECE
    scan.PIECE = piece
    try:
        assert support() == expected
    finally:
        scan.PIECE = before


def test_equal_scores_fill_the_budget_in_canonical_order():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))

        def forward(self):
            return self.a.sum() + self.b.sum()

    model = Sums()
    tuner = st.attach(model, st.id3(7, 3))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for expected in ({"b": [0, 1]}, {"b": [0, 1, 2, 3]}, {"b": [0, 1, 2, 3, 4, 5], "a": [0]}):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert {n: f.tolist() for n, f in tuner.support.items()} == expected


def test_the_toolkits_tie_case():
    """methods 2.1: g0 = [9, 1, 1, 1], g1 = [0, 1, 1, 1]; the released toolkit drops the entry it trained first."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    tuner = st.attach(model, st.id3(2, 2, exp=0.0))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for g, expected in (([9.0, 1.0, 1.0, 1.0], [0]), ([0.0, 1.0, 1.0, 1.0], [0, 1])):
        model(torch.tensor([g])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert tuner.support["weight"].tolist() == expected
    assert torch.allclose(model.weight, torch.tensor([[-0.9, -0.1, 0.0, 0.0]]))


def test_weight_decay_leaves_unselected_weights_at_one():
    """methods 2.1, defect 5: with AdamW's default decay the released toolkit moves them to 0.999."""
    model = nn.Linear(10, 1, bias=False)
    nn.init.ones_(model.weight)
    tuner = st.attach(model, st.id3(3, 1))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
    model(torch.arange(1.0, 11.0)[None]).sum().backward()
    optimizer.step()
    assert sorted(tuner.support["weight"].tolist()) == [7, 8, 9]
    assert model.weight.flatten()[:7].tolist() == [1.0] * 7


@pytest.mark.parametrize("budget", [1, 3])
def test_a_budget_below_the_number_of_steps(budget):
    model = Mixed()
    tuner = st.attach(model, st.id3(budget, 5))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    counts = []
    for i in range(8):
        mixed_loss(model, tokens(i)).backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(tuner.selected)
    assert counts == [(t + 1) * budget // 5 for t in range(5)] + [budget] * 3


def test_adam_kicks_a_late_entry_as_the_reference_does():
    """methods 0.1: one shared step count; an entry first selected at step 1000 moves by -0.25146 instead of -0.1."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    tuner = st.attach(model, st.id3(2, 1000, every=999, exp=0.0))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1, eps=1e-30, weight_decay=0.0)
    tuner.engine.tracker.chooser.schedule = st.schedule.Quotas([1] + [0] * 998 + [1])
    for step in range(1000):
        model(torch.tensor([[5.0, 0.0 if step < 999 else 1.0]], dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.weight[0, 1].item() == pytest.approx(-0.25146, abs=1e-5)
