"""Canonical scores: what is selected depends on the factors and the weights alone, whatever way finds it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import selectune as st
from selectune import internals
from selectune.ops import bounds
from selectune.train.choose import growing, products

METHODS = [st.id3(budget=300, steps=6), st.id3(budget=90, steps=6, exp=1.0, eps=0.01), st.static_d3(budget=40)]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 10))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(70, 24, generator=generator) for _ in range(count)]


def train(method, watch=None):
    net = model()
    tuner = st.attach(net, method)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for x in batches(6):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch(tuner)
    return tuner


def force(patch, way):
    """One way for all tensors that have a cutoff."""
    if not internals.fast_int8():
        patch.setattr(internals, "int8_product", lambda q, p, out: out.copy_((q.double() @ p.double()).int()))
    patch.setattr(bounds, "pays", lambda t, o, i: way != "dense")
    patch.setattr(bounds, "SHARE", 1.0)
    if way == "norms":
        patch.setattr(bounds, "EXACT", 1e-9)
    elif way == "int8":
        patch.setattr(bounds, "_by_norms", lambda *given: None)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.score.parameters['exp']}")
def test_the_same_support_by_every_way_and_on_every_number_of_threads(method):
    found = {}
    for way in ("dense", "norms", "int8"):
        for threads in (1, 3):
            with pytest.MonkeyPatch.context() as patch:
                force(patch, way)
                torch.set_num_threads(threads)
                tuner = train(method)
                torch.set_num_threads(1)
            assert tuner.selected == tuner.budget
            found[way, threads] = {name: flat.tolist() for name, flat in tuner.support.items()}
    assert all(support == found["dense", 1] for support in found.values())


@pytest.mark.parametrize("name", ["reference", "dense", "numba"])
def test_the_same_support_on_every_backend(name, monkeypatch):
    wanted = {n: flat.tolist() for n, flat in train(METHODS[0]).support.items()}
    monkeypatch.setenv("SELECTUNE_BACKEND", name)
    assert {n: flat.tolist() for n, flat in train(METHODS[0]).support.items()} == wanted


def test_the_ways_are_taken(monkeypatch):
    """`force` does what the test above takes for granted."""
    for way in ("norms", "int8"):
        with monkeypatch.context() as patch:
            force(patch, way)
            calls, real = [], products.above

            def counted(*given, calls=calls, real=real):
                calls.append(real(*given))
                return calls[-1]

            patch.setattr(products, "above", counted)
            train(METHODS[0])
        assert sum(flat is not None for flat in calls) > len(calls) // 2


@pytest.mark.parametrize("way", ["dense", "norms", "int8"])
def test_every_step_selects_what_float64_says(way, monkeypatch):
    """The oracle scores all entries of the recorded factors. Scores that differ by rounding may change places."""
    force(monkeypatch, way)
    seen, real = {}, products.scan_product

    def scan(collector, score, tensor, taken, factors):
        weight = tensor.weight.double()
        scores = (factors.dy.double().mT @ factors.x.double()).abs() / (weight.abs() + 1.0) ** 2
        if taken is not None:
            scores.view(-1)[taken] = -1.0
        seen[tensor.name] = scores.view(-1)
        return real(collector, score, tensor, taken, factors)

    monkeypatch.setattr(growing, "scan_product", scan)
    before, steps = {}, []

    def look(tuner):
        new = {
            name: flat[~torch.isin(flat, before.get(name, torch.empty(0, dtype=torch.int64)))]
            for name, flat in tuner.support.items()
        }
        lowest = min((float(seen[name][flat].min()) for name, flat in new.items() if name in seen and len(flat)))
        for name, scores in seen.items():
            left = scores.clone()
            left[new.get(name, torch.empty(0, dtype=torch.int64))] = -1.0
            assert float(left.max()) <= lowest * (1 + 1e-6), (name, tuner.step)
        before.clear()
        before.update({name: flat.clone() for name, flat in tuner.support.items()})
        steps.append(tuner.selected)
        seen.clear()

    train(st.id3(budget=300, steps=6, scope=st.Scope(include="*.weight")), look)
    assert steps == [50, 100, 150, 200, 250, 300]


def test_large_quotas_and_other_dtypes_go_as_before(monkeypatch):
    """Quota, score and dtypes alone decide it, so scores of one kind are compared."""
    offered = []
    monkeypatch.setattr(growing, "scan_product", lambda *given: offered.append(given) or (False, None))
    monkeypatch.setattr(products, "CANONICAL", 100)
    train(st.static_d3(budget=101))
    assert not offered
    train(st.static_d3(budget=100))
    assert offered


def test_broken_gradients_are_named(caplog):
    net = model()
    tuner = st.attach(net, st.id3(budget=30, steps=3))
    (net(batches(1)[0]).square().mean() * float("inf")).backward()
    assert tuner.events["nonfinite_selections"] == 1
    assert "not finite" in caplog.text
