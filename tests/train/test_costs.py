"""What a step costs is counted: calls grow with the layers, not faster, and one dense gradient is alive at a time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import selectune as st
from selectune import ops
from selectune.bench.trace import Storages
from selectune.train.choose import growing, scan
from selectune.train.graph import nodes
from selectune.train.support import store

WIDTH = 64
DENSE = WIDTH * WIDTH * 4  # bytes of one layer's gradient


def stack(depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth)))


def count_calls(monkeypatch) -> Counter[str]:
    calls: Counter[str] = Counter()
    counted = ("sampled_matmul", "weight_gradient", "score_filter", "scatter_many", "sampled_sum", "gather_entries")
    for name in counted:
        monkeypatch.setattr(ops, name, _counting(calls, name, getattr(ops, name)))
    monkeypatch.setattr(growing, "scan", _counting(calls, "scan", growing.scan))
    return calls


def _counting(calls, name, function):
    def call(*args, **more):
        calls[name] += 1
        return function(*args, **more)

    return call


def calls_of_a_step(monkeypatch, method, depth: int) -> Counter[str]:
    model = stack(depth)
    tuner = st.attach(model, method)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    calls = Counter()
    with monkeypatch.context() as patch:
        for step in range(3):
            if step == 2:
                calls = count_calls(patch)
            model(torch.randn(100, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return calls


def test_a_static_step_samples_each_weight_once_and_writes_all_at_once(monkeypatch):
    calls = calls_of_a_step(monkeypatch, st.random(budget=0.05), 6)
    assert calls["sampled_matmul"] == calls["sampled_sum"] == 6
    assert calls["scatter_many"] == 1
    assert calls["weight_gradient"] == calls["scan"] == calls["score_filter"] == 0


def test_a_selecting_step_reads_each_tensor_once(monkeypatch):
    calls = calls_of_a_step(monkeypatch, st.id3(budget=0.05, steps=20), 6)
    assert calls["weight_gradient"] == 6
    assert calls["scan"] == 6  # biases; weights are offered as factors
    assert calls["score_filter"] <= 12
    assert calls["sampled_matmul"] == 0
    assert calls["scatter_many"] == 1


@pytest.mark.parametrize("method", [st.random(budget=0.05), st.id3(budget=0.05, steps=20)], ids=["static", "selecting"])
def test_calls_grow_with_the_layers_and_not_faster(monkeypatch, method):
    few, many = (sum(calls_of_a_step(monkeypatch, method, depth).values()) for depth in (4, 16))
    assert few < many <= 4 * few


def peak(method, depth: int) -> int:
    """The most bytes that one backward pass of the third step makes and keeps, memory used again not counted."""
    model = stack(depth)
    tuner = st.attach(model, method)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    storages = Storages({p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()})
    for step in range(3):
        loss = model(torch.randn(8, WIDTH)).square().mean()
        if step < 2:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            continue
        with storages:
            loss.backward()
    return storages.peak


def test_one_dense_gradient_is_alive_at_a_time():
    for depth in (4, 16):
        more = peak(st.id3(budget=200, steps=20), depth) - peak(st.random(budget=200), depth)
        assert more < 4 * DENSE  # scores of one tensor and what finds its best, whatever the depth


def test_names_that_are_counted_exist():
    assert nodes.ops is store.ops is scan.ops is ops
