"""What a shelf keeps ready for a switch: used while it holds, given up as soon as anything about the model changed."""

from __future__ import annotations

import copy

import pytest
import torch
from delta_kit import Bag, make_delta, snapshot
from test_shelf import Tied, alone, deltas_on, line
from torch import nn

from selectune.delta import Shelf, base_info, diff, switch
from selectune.delta.live import quick
from selectune.errors import BaseMismatchError, DeltaStateError


@pytest.fixture
def careful(monkeypatch) -> list[str | None]:
    """The names of the deltas to which a switch was made without a plan."""
    seen: list[str | None] = []
    real = Shelf._switch_with_care
    monkeypatch.setattr(
        Shelf, "_switch_with_care", lambda self, model, name, claim: (seen.append(name), real(self, model, name, claim))
    )
    return seen


def test_the_second_switch_to_a_name_is_planned(careful):
    model = Tied(torch.float32, 3)
    model.inner.weight.data = model.inner.weight.data.contiguous()
    base, deltas = snapshot(model), deltas_on(model, 3, 7)
    states = {name: alone(model, delta) for name, delta in deltas.items()} | {None: base}
    Shelf(model, deltas)
    for name in (*deltas, None, *deltas, *reversed(deltas), None, "d1", "d1", None):
        switch(model, name)
        assert snapshot(model) == states[name]
    assert [name for name in careful if name is not None] == ["d0", "d1", "d2"]


def test_a_delta_that_writes_most_of_a_model_whole_is_not_kept(careful):
    model = Bag({"w": torch.zeros(10)})
    shelf = Shelf(model, {"all": make_delta(model, {}, {}, dense={"w": torch.ones(10)})})
    for _ in range(2):
        with shelf.using("all"), shelf.using("all"):
            assert model.w.sum() == 10
        switch(model, None)
    assert careful == ["all", None] * 2
    assert not shelf._plans


@pytest.mark.parametrize("change", ["dtype", "tie", "parameter", "rename", "buffer", "shape"])
def test_another_structure_is_seen(change):
    model, deltas = line()
    shelf = Shelf(model, deltas)
    for name in ("a", "b", None):
        switch(model, name)
    if change == "dtype":
        model.double()
    elif change == "tie":
        model.v = model.w
    elif change == "parameter":
        model.more = nn.Parameter(torch.zeros(1))
    elif change == "rename":
        model._parameters["u"] = model._parameters.pop("v")
    elif change == "buffer":
        model.register_buffer("count", torch.zeros(1))
    else:
        model.v.data = torch.ones(4)
    before = snapshot(model)
    for work in (lambda: switch(model, "a"), lambda: shelf.using("b").__enter__()):
        with pytest.raises(BaseMismatchError):
            work()
    assert snapshot(model) == before


def test_other_memory_is_seen(careful):
    model, deltas = line()
    shelf = Shelf(model, deltas)
    for name in ("a", "b", "a"):
        switch(model, name)
    careful.clear()
    old = model.w.data
    model.w.data = old.clone()
    with shelf.using("a"):
        pass
    switch(model, "b")
    assert model.w.tolist() == [0.0, 20.0, 21.0, 3.0, 4.0, 5.0]
    assert old.tolist()[0] == 10.0
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    switch(model, None)
    assert model.w.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert careful == ["b", None]


def test_a_base_that_differs_under_a_value_that_hides_it():
    """c writes the values of a's base, so the model looks right to a, but a revert would restore the wrong values."""
    model = Bag({"w": torch.zeros(6)})
    a = make_delta(model, {"w": torch.tensor([1])}, {"w": torch.tensor([5.0])})
    other = Bag({"w": torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0, 0.0])})
    c = make_delta(other, {"w": torch.tensor([1])}, {"w": torch.tensor([0.0])})
    shelf = Shelf(model, {"a": a})
    for name in ("a", None):
        switch(model, name)
    with torch.no_grad():
        model.w[1] = 9.0
    shelf.add("c", c)
    for _ in range(2):
        switch(model, "c")
        with pytest.raises(BaseMismatchError):
            switch(model, "a")
    switch(model, None)
    assert model.w.tolist() == other.w.tolist()


def test_tensors_that_two_deltas_write_in_different_ways(careful):
    model = Bag({"w": torch.zeros(40), "v": torch.zeros(2), "t": torch.zeros(3, 2).t()})
    base = snapshot(model)
    deltas = {
        "places": make_delta(model, {"v": torch.tensor([1]), "t": torch.tensor([1, 4])},
                             {"v": torch.ones(1), "t": torch.ones(2)}),
        "whole": make_delta(model, {"w": torch.tensor([3])}, {"w": torch.ones(1)}, dense={"v": torch.full((2,), 2.0)}),
        "too": make_delta(model, {"t": torch.tensor([1, 2])}, {"t": torch.full((2,), 3.0)},
                          dense={"v": torch.full((2,), 4.0)}),
    }  # fmt: skip
    states = {name: alone(model, delta) for name, delta in deltas.items()} | {None: base}
    Shelf(model, deltas)
    for name in [*deltas, None] * 2 + [*reversed(deltas), None, "whole", "too", "whole", None]:
        switch(model, name)
        assert snapshot(model) == states[name]
    assert careful.count("whole") < 4


def test_a_drawn_head_that_changed_is_seen_by_a_planned_switch():
    model = Bag({"w": torch.zeros(6), "head": torch.ones(3)})
    delta = make_delta(
        model, {"w": torch.tensor([1])}, {"w": torch.ones(1)}, base=base_info(model, initialised=["head"])
    )
    Shelf(model, {"a": delta})
    for name in ("a", None, "a", None):
        switch(model, name)
    with torch.no_grad():
        model.head[0] = 2.0
    with pytest.raises(BaseMismatchError, match="initialised otherwise"):
        switch(model, "a")


def test_inference_mode_and_training_after_it():
    model = nn.Linear(20, 20)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.weight.view(-1)[::40] += 1
    shelf, x = Shelf(model, {"a": diff(model, tuned)}), torch.randn(2, 20)
    before = snapshot(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for name in ("a", None, "a"):
            with mode(), shelf.using(name):
                assert torch.equal(model(x), (tuned if name else model)(x))
    loss = model(x.requires_grad_()).sum()
    switch(model, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert snapshot(model) == before


def test_plans_go_with_the_model():
    model, deltas = line()
    shelf = Shelf(model, deltas)
    switch(model, "a")
    assert shelf._plans
    del model
    assert not shelf._plans
    with pytest.raises(DeltaStateError, match="gone"), shelf.using("a"):
        pass


def test_a_look_reads_no_weight_and_sees_no_value():
    model = Tied(torch.float32, 1)
    before = quick.look(model)
    with torch.no_grad():
        model.embed.zero_()
    assert quick.look(model) == before
