"""Outputs of our nodes may be changed in place, whatever their shape, like outputs of torch's nodes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import selectune as st

OPERATIONS = {
    "relu_": lambda y: y.relu_(),
    "add_": lambda y: y.add_(1),
    "mul_": lambda y: y.mul_(0.5),
    "dropout": lambda y: nn.functional.dropout(y, 0.0, inplace=True),
    "masked_fill_": lambda y: y.masked_fill_(y > 1, 0),
    "index": lambda y: y.__setitem__((..., 0), 0.0) or y,
    "silu": lambda y: nn.functional.silu(y, inplace=True),
    "view": lambda y: y.unsqueeze(0).add_(1),
}
SHAPES = {"1-d": (8,), "2-d": (3, 8), "3-d": (2, 3, 8), "4-d": (2, 1, 3, 8)}
LAYERS = {
    "linear": lambda: nn.Linear(8, 8),
    "linear without bias": lambda: nn.Linear(8, 8, bias=False),
    "layer norm": lambda: nn.LayerNorm(8),
    "embedding": lambda: nn.Embedding(9, 8),
    "tapped": lambda: nn.Conv1d(1, 1, 3, padding=1),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_node_and_every_operation(layer, operation):
    for shape in SHAPES.values():
        torch.manual_seed(0)
        model = LAYERS[layer]().double()
        x = torch.randn(shape, dtype=torch.float64)
        if layer == "embedding":
            x = torch.randint(0, 9, shape)
        if layer == "tapped":
            x = x.reshape(-1, 1, 8)
        plain, entries = copy.deepcopy(model), sum(p.numel() for p in model.parameters())
        (OPERATIONS[operation](plain(x)) ** 2).sum().backward()
        tuner = st.attach(model, st.random(budget=entries))
        (OPERATIONS[operation](model(x)) ** 2).sum().backward()
        expected = torch.cat([p.grad.reshape(-1) for p in plain.parameters()])
        slots = torch.cat([page.slot for page in tuner.engine.ledger.pages])
        assert torch.allclose(tuner.parameters()[0].grad[slots], expected, rtol=1e-12, atol=1e-14)
