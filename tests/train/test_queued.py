"""Selection without a wait for the device, forced on the CPU: the same entries, and no number read layer by layer."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import selectune as st
from selectune.train.choose import growing, products, scan

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")


class Waits(TorchDispatchMode):
    """Counts the operators that would make the host wait for a GPU: those that read a number or size by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or masks:
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_canonical_scores(monkeypatch):
    """As on a GPU, for both sides of a comparison."""
    monkeypatch.setattr(products, "canonical", lambda *given: False)


@pytest.fixture
def queued(monkeypatch):
    """As on a GPU: gradients are queued; in small pieces."""
    scanned: list[str] = []

    def call(collector, score, tensor, *rest):
        scanned.append(tensor.name)
        return scan.scan_queued(collector, score, tensor, *rest)

    monkeypatch.setattr(growing, "queues", lambda tensor, collector: True)
    monkeypatch.setattr(growing, "scan_queued", call)
    monkeypatch.setattr(scan, "QUEUED_PIECE", 700)
    return scanned


class Model(nn.Module):
    def __init__(self, depth: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 24, padding_idx=3)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(depth))
        self.norm = nn.LayerNorm(24)
        self.to(dtype)

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.norm(x).float().square().mean(1).sum()


def batches(count: int):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (4, 9), generator=generator) for _ in range(count)]


def trained(method, dtype=torch.float32, accumulation_steps=1, steps=6):
    model = Model(3, dtype)
    tuner = st.attach(model, method, accumulation_steps=accumulation_steps)
    optimizer = st.SparseAdamW(tuner.parameters(), lr=1e-2)
    for number, ids in enumerate(batches(steps * accumulation_steps), 1):
        model(ids).backward()
        if number % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    return tuner


METHODS = [
    st.id3(budget=60, steps=6),
    st.id3(budget=700, steps=3, exp=1.0),
    st.repeat_d3(budget=60, steps=6),
    st.static_d3(budget=60),
    st.gallop(budget=60),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_same_run_bit_for_bit(method, dtype, accumulation_steps, request):
    plain = trained(method, dtype, accumulation_steps)
    assert plain.selected == plain.budget
    expected = {name: flat.clone() for name, flat in plain.support.items()}
    values = plain.state_dict()["tensors"]["offsets"]
    scanned = request.getfixturevalue("queued")
    tuner = trained(method, dtype, accumulation_steps)
    assert scanned
    assert {n: f.tolist() for n, f in tuner.support.items()} == {n: f.tolist() for n, f in expected.items()}
    assert torch.equal(tuner.state_dict()["tensors"]["offsets"], values)


def test_scores_that_are_not_finite_void_the_selection_and_are_named(queued, caplog):
    model = Model(2)
    tuner = st.attach(model, st.id3(budget=40, steps=4))
    optimizer = st.SparseAdamW(tuner.parameters(), lr=1e-3)
    for number, ids in enumerate(batches(4)):
        loss = model(ids)
        (loss * float("nan") if number == 1 else loss).backward()
        if number == 1:
            tuner.parameters()[0].grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
        assert tuner.selected == (10, 10, 30, 40)[number]
    assert tuner.events["nonfinite_selections"] == 1
    assert 'scores of "norm.weight"' in caplog.text


def waits_of_a_step(depth: int) -> Counter[str]:
    model = Model(depth)
    tuner = st.attach(model, st.id3(budget=1200, steps=4))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3)
    counted = Waits()
    for number, ids in enumerate(batches(3)):
        with counted if number == 2 else nullcontext():
            model(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len([flat for flat in tuner.support.values() if flat.numel()]) > depth
    return counted.count


def test_no_layer_makes_the_host_wait(queued):
    few, many = waits_of_a_step(2), waits_of_a_step(9)
    assert few == many
    assert sum(few.values()) <= 9  # embeddings by row, and one close


def test_the_count_sees_a_layer_that_waits():
    """Offered instead of queued, as on a CPU, numbers are read layer by layer."""
    assert sum(waits_of_a_step(9).values()) >= sum(waits_of_a_step(2).values()) + 7
