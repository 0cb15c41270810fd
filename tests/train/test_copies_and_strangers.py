"""Copies of an attached model, and weights that others put in place of its own."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from loop_kit import Tied, X, loss
from torch import nn

import selectune as st
from selectune.errors import IntegrityError


def trained(model, method, steps, optimizer=None):
    tuner = st.attach(model, method)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    go_on(model, optimizer, range(steps))
    return tuner, optimizer


def go_on(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss(model(X[step])).backward()
        optimizer.step()


def test_a_copy_keeps_the_weights_it_is_given():
    """A moving average over deep copies, as many recipes have it: its forward must not write the tuner's values."""
    model = Tied()
    tuner, optimizer = trained(model, st.id3(40, 4), 2)
    model(X[0])  # a graph that waits for its backward pass
    average = copy.deepcopy(model)
    go_on(model, optimizer, range(2, 4))
    with torch.no_grad():
        for mine, other in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mine.lerp_(other, 0.5)
    expected = {name: value.clone() for name, value in average.state_dict().items()}
    average(X[0])
    assert all(torch.equal(value, expected[name]) for name, value in average.state_dict().items())
    average.load_state_dict(model.state_dict())
    assert torch.equal(average(X[0])[0], model(X[0])[0])
    tuner.verify()


SPAWNED = """
import torch, selectune as st
from torch import nn

class Rows(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model
    def __len__(self):
        return 4
    def __getitem__(self, i):
        assert type(self.model[0].weight) is nn.Parameter
        return self.model(torch.full((1, 4), float(i))).detach()

if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    tuner = st.attach(model, st.static_d3(budget=5))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    workers = torch.utils.data.DataLoader(Rows(model), num_workers=2, multiprocessing_context="spawn")
    found = torch.cat(list(workers))
    with torch.no_grad():
        assert torch.equal(found, torch.stack([model(torch.full((1, 4), float(i))) for i in range(4)]))
    model(torch.ones(2, 4)).sum().backward()
    assert tuner.parameters()[0].grad.count_nonzero() > 0
"""


def test_workers_that_are_spawned_get_an_ordinary_model(tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    subprocess.run([sys.executable, str(tmp_path / "spawned.py")], check=True, timeout=120)


def test_other_weights_for_one_call():
    model = Tied()
    st.attach(model, st.id3(40, 4))
    zeros = {name: torch.zeros_like(value) for name, value in Tied().named_parameters()}
    assert not torch.func.functional_call(model, zeros, (X[0],))[0].any()


@pytest.mark.parametrize("where", ["a", "b", "one"])
def test_another_parameter_in_place_of_one_in_scope_is_found(where):
    model = Tied()
    tuner, _ = trained(model, st.id3(40, 4), 1)
    layer = model.get_submodule(where)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(IntegrityError, match=rf"{where}\.weight"):
        tuner.verify()


def test_a_state_dict_whose_tensors_take_the_weights_places_is_refused():
    model = Tied()
    state = copy.deepcopy(model.state_dict())
    st.attach(model, st.id3(40, 4))
    with pytest.raises(IntegrityError, match="load_state_dict"):
        model.load_state_dict(state, assign=True)


def test_averaged_values_that_are_swapped_in_for_an_evaluation():
    """Averages are often written by `parameter.data.copy_`, which torch gives no version."""
    model = Tied()
    tuner = st.attach(model, st.random(budget=20))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    (offsets,) = tuner.parameters()
    seen = []
    for step in range(3):
        loss(model(X[step])).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(offsets.detach().clone())
    weights = copy.deepcopy(model).state_dict()
    average, last = torch.stack(seen).mean(0), seen[-1]
    offsets.data.copy_(average)
    with torch.no_grad():
        model(X[0])
    assert not torch.equal(model.a.weight, weights["a.weight"])
    held = torch.cat([dict(model.named_parameters())[n].view(-1)[f] for n, f in tuner.support.items()])
    assert torch.equal(held.sort().values, tuner.values.sort().values)
    offsets.data.copy_(last)
    with torch.no_grad():
        model(X[0])
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
