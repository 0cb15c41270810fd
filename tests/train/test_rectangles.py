"""Supports of whole rows, columns, blocks and subnets: small dense products, and inputs of which a part is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import selectune as st
from selectune.errors import ConfigError
from selectune.schedule import Increment, OneShot
from selectune.structure import Structure
from selectune.train.support.rectangles import rectangles


@settings(max_examples=60)
@given(some.data())
def test_rectangles_cover_every_entry_once(data):
    """Up to two rectangles of drawn rows and columns, the second with rows of its own, as a unit in part is."""
    o, i = data.draw(some.integers(1, 12)), data.draw(some.integers(1, 12))
    rows = data.draw(some.lists(some.integers(0, o - 1), min_size=1, unique=True))
    cut = data.draw(some.integers(0, len(rows)))
    mask = torch.zeros(o, i, dtype=torch.bool)
    for mine in (rows[:cut], rows[cut:]):
        columns = data.draw(some.lists(some.integers(0, i - 1), min_size=1, unique=True))
        mask[torch.tensor(mine, dtype=torch.int64)[:, None], torch.tensor(columns)] = True
    flat = mask.view(-1).nonzero()[:, 0]
    dtype = data.draw(some.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    dy, x = (torch.randint(-4, 5, (7, n)).to(dtype) for n in (o, i))  # sums of integers are exact

    found = rectangles(flat, i)

    assert found is not None
    assert torch.equal(found.gradient(dy, found.kept(x)).double(), (dy.double().mT @ x.double()).view(-1)[flat])


def test_scattered_entries_are_no_rectangles():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randperm(64 * 64, generator=generator)[:300].sort().values
    assert rectangles(flat, 64) is None
    assert rectangles(flat[:0], 64) is None


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 24), torch.nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).square())


METHODS = {
    "columns": st.paca(64),
    "columns, the last in part": st.paca(77),
    "rows": st.Method(score=st.scores.magnitude(), schedule=OneShot(72), structure=Structure("row")),
    "blocks": st.Method(score=st.scores.magnitude(), schedule=OneShot(100), structure=Structure("block", size=4)),
    "subnets": st.Method(
        score=st.scores.magnitude(),
        select=st.select.PerTensor(),
        schedule=OneShot(90),
        structure=Structure("subnet", pool="sum"),
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("uses", [1, 2])
def test_the_gradient_is_that_of_autograd(name, uses):
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(9, 32, dtype=torch.float64)
    dense = copy.deepcopy(model)
    tuner = st.attach(model, METHODS[name])
    for net in (model, dense):
        sum(net(x * k).sum() for k in range(1, uses + 1)).backward()  # pyright: ignore
    (offsets,) = tuner.parameters()
    whole = {name: torch.as_tensor(parameter.grad) for name, parameter in dense.named_parameters()}
    wanted = torch.cat([whole[name].view(-1)[flat] for name, flat in tuner.support.items()])
    assert offsets.grad is not None
    torch.testing.assert_close(offsets.grad.sort().values, wanted.sort().values)


def test_of_an_input_only_the_trained_columns_are_kept():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(32, 24), torch.randn(9, 32, requires_grad=True)
    tuner = st.attach(layer, st.paca(48))  # two of 32 columns
    y = layer(x)  # older versions of torch free what is saved together with the output
    assert y.grad_fn.saved_tensors[0].shape == (9, 2)
    tuner.detach()
    st.attach(layer, st.random(48))
    y = layer(x)
    assert y.grad_fn.saved_tensors[0].shape == (9, 32)


def test_units_are_not_chosen_in_backward():
    """Else a selecting step would need the whole input."""
    with pytest.raises(ConfigError, match="Whole units"):
        st.Method(score=st.scores.d3(), schedule=Increment(64, steps=4), structure=Structure("row"))
