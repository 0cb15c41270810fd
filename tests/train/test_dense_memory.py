"""The bytes that a dense phase reports are those that it holds, counted tensor by tensor after a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import selectune as st
from selectune.ops.scratch import _blocks, release
from selectune.schedule import Rounds


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(3, 40, dtype=model[0].weight.dtype)).float().square().mean().backward()
    optimizer.step()


def held(tuner, optimizer):
    phase = tuner.engine.phase
    weights = [t.parameter for t in phase.tensors]
    latents = phase.parameters()
    found = [tuner.engine.base.whole[t.name] for t in phase.tensors] + phase._before
    trained = {id(p): p for p in [*latents, *weights]}.values()
    found += [p.grad for p in trained if p.grad is not None]
    found += [p for p in latents if all(p is not w for w in weights)]
    found += [optimizer.state[p][name] for p in latents for name in ("exp_avg", "exp_avg_sq")]
    found += [block for purpose, block in _blocks().items() if purpose.startswith("dense")]
    return size(found)


METHODS = {
    "weights": lambda **o: st.lt_sft(30, 8, dense=4, **o),
    "masked": lambda **o: st.child_tuning_f(0.5),
    "gates": lambda **o: st.diff_pruning(30, 8, structured=False, **o),
    "structured": lambda **o: st.diff_pruning(30, 8, **o),
    "found": lambda **o: st.diff_pruning(30, 8, start_from="found", **o),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads", [(), ("2.*",)])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_what_is_said_is_held(make, heads, dtype, caplog):
    release()
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5)).to(dtype)
    tuner = st.attach(model, make(train_fully=heads))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3)
    for _ in range(2):
        step(model, optimizer)
    assert held(tuner, optimizer) == tuner.engine.phase.bytes()
    assert f"holds {tuner.engine.phase.bytes():,} bytes" in caplog.text
    tuner.detach()
    assert not _blocks()


def test_a_later_round_works_on_a_copy_of_the_base():
    release()
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))
    method = st.Method(score=st.scores.change(), schedule=Rounds(30, 12, 4, 2), dense=st.phases.Gates(), name="gated")
    tuner = st.attach(model, method)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    first = tuner.engine.phase.bytes()
    for _ in range(8):
        step(model, optimizer)
    assert tuner.in_dense_phase
    assert tuner.selected == 15
    assert first < held(tuner, optimizer) == tuner.engine.phase.bytes()
    for _ in range(4):
        step(model, optimizer)
    assert not tuner.in_dense_phase
    assert not [purpose for purpose in _blocks() if purpose.startswith("dense")]
