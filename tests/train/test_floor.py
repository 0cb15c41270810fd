"""Nothing of backward runs below the lowest selected entry, and no activation from there is kept. Nodes are counted."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from torch import nn

import selectune as st
from selectune.bench.workload import Bench, batches, build, config_of

DEPTH = 9


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16)) for _ in range(DEPTH)))


def nodes(output: torch.Tensor) -> Counter[str]:
    """The kinds of autograd nodes that a backward pass from here runs."""
    seen, waiting, kinds = set(), [output.grad_fn], Counter()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kinds[node.name()] += 1
        waiting.extend(parent for parent, _ in node.next_functions)
    return kinds


def steps(model, tuner, batch, count, loss_of):
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3)
    for _ in range(count):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_of_stack(model, batch):
    return model(batch).square().mean()


METHODS = {
    "scope": (st.random(budget=60, scope=st.Scope(include="[678].0.*")), 1),
    "weights that are small there": (st.pafi(budget=60), 1),
    "static gradient": (st.static_d3(budget=60, scope=st.Scope(include="[678].0.*")), 1),
    "between selections": (st.id3(budget=60, steps=40, every=20, scope=st.Scope(include="[678].0.*")), 2),
    "watched": (st.spiel_ag(budget=200, steps=40, every=20, window=5, scope=st.Scope(include="[678].0.*")), 17),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_backward_ends_at_the_lowest_selected_layer(name):
    method, before = METHODS[name]
    model, batch = stack(), torch.randn(5, 16)
    if name.startswith("weights"):
        for block in model[6:]:
            block[0].weight.data.mul_(1e-3)
        for block in model[:6]:
            for parameter in block.parameters():
                parameter.data.copy_(parameter.data.abs() + 1.0)
    tuner = st.attach(model, method)
    steps(model, tuner, batch, before, loss_of_stack)
    kept = []
    for k, block in enumerate(model):
        block[1].register_forward_hook(
            lambda module, args, out, k=k: kept.append((k, weakref.ref(out), out.requires_grad))
        )
    loss = loss_of_stack(model, batch)
    lowest = min(int(name.partition(".")[0]) for name, flat in tuner.support.items() if len(flat))
    assert lowest >= 6
    for k, activation, needs in kept:
        assert needs == (k >= lowest)
        if k < lowest:
            assert activation() is None, f"the activation of block {k} is kept"
    assert nodes(loss)["GeluBackward0"] == DEPTH - lowest


def test_a_bert_trained_in_its_last_layer():
    pytest.importorskip("transformers")
    bench = Bench("tiny", 2, 16)
    config = config_of("tiny")
    config.num_hidden_layers = 6
    model, batch = build(config, torch.float32, "cpu"), batches(bench, config, 1)[0]
    tuner = st.attach(model, st.random(budget=300, scope=st.Scope(include="*layer.[45].*")))

    def loss_of(model, batch):
        return model(**batch).loss

    steps(model, tuner, batch, 1, loss_of)  # until then nothing is known to be reached, and all is followed
    assert nodes(loss_of(model, batch))["GeluBackward0"] == 2
