"""Inputs that are not saved because the node before can make them again: the same bits, less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import selectune as st
from selectune.train.graph import recompute

MAKERS = {
    "gelu": F.gelu,
    "gelu of tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "gated": lambda h: F.silu(h) * (h + 1),
}


class Deep(nn.Module):
    """Two blocks whose inner tensors have one shape, so that both use the same memory when they are made again."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(F.gelu) for _ in range(2))
        self.between = nn.Linear(3, 6)

    def forward(self, x):
        return self.blocks[1](self.between(self.blocks[0](x)))


class Block(nn.Module):
    """up, an activation, down: the MLP of a transformer."""

    def __init__(self, make, after=lambda x: x):
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 3)
        self.make, self.after = make, after

    def forward(self, x):
        return self.down(self.after(self.make(self.up(x))))


def gradient(make, after=lambda x: x, wrap=lambda block, x: block(x), dtype=torch.float32):
    """The gradient of the values in one backward pass, and how many of the two linear layers saved their input."""
    torch.manual_seed(0)
    block = Block(make, after).to(dtype)
    tuner = st.attach(block, st.random(budget=40, scope="*weight"), seed=1)
    loss = wrap(block, torch.randn(5, 6, dtype=dtype)).square().mean()
    saved = sum(node.saved_tensors[0] is not None for node in linear_nodes(loss.grad_fn))
    loss.backward()
    return tuner.parameters()[0].grad, saved


def linear_nodes(node):
    found, waiting, seen = [], [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if "SparseLinear" in node.name():
            found.append(node)
    return found


def bits(tensor):
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MAKERS)
def test_the_gradient_has_the_bits_of_one_from_a_saved_input(monkeypatch, name, dtype):
    got, less = gradient(MAKERS[name], dtype=dtype)
    monkeypatch.setattr(recompute, "OUTPUTS", {})
    wanted, more = gradient(MAKERS[name], dtype=dtype)
    assert bits(got) == bits(wanted)
    assert got.count_nonzero() == 40
    assert (less, more) == (1, 2)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("method", [st.random(budget=90), st.id3(budget=90, steps=3)], ids=["sampled", "dense"])
def test_two_layers_that_share_the_memory(monkeypatch, backend, method):
    monkeypatch.setenv("SELECTUNE_BACKEND", backend)
    runs = []
    for outputs in (dict(recompute.OUTPUTS), {}):
        monkeypatch.setattr(recompute, "OUTPUTS", outputs)
        torch.manual_seed(0)
        model = Deep()
        tuner = st.attach(model, method, seed=1)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for _ in range(3):
            model(torch.randn(200, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((bits(tuner.parameters()[0].detach()), {n: f.tolist() for n, f in tuner.support.items()}))
    assert runs[0] == runs[1]


def test_it_holds_under_checkpointing(monkeypatch):
    def wrap(block, x):
        return checkpoint(block, x, use_reentrant=False)

    got, _ = gradient(F.gelu, wrap=wrap)
    monkeypatch.setattr(recompute, "OUTPUTS", {})
    assert bits(got) == bits(gradient(F.gelu)[0])


def scaled_in_silence(x):
    with torch.no_grad():
        x.mul_(2)
    return x


@pytest.mark.parametrize(
    "after",
    [scaled_in_silence, lambda x: x * 2, lambda x: x.relu(), lambda x: x.view(5, 4, 5).flatten(1)],
    ids=["changed in place", "times a number", "an activation that keeps its output", "a view"],
)
def test_what_cannot_be_made_again_is_saved(monkeypatch, after):
    got, _ = gradient(F.gelu, after)
    monkeypatch.setattr(recompute, "OUTPUTS", {})
    assert bits(got) == bits(gradient(F.gelu, after)[0])


def test_a_product_with_a_frozen_factor():
    mask = torch.rand(5, 20)
    got, _ = gradient(F.gelu, lambda x: x * mask)
    assert got.count_nonzero() == 40
