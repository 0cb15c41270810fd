"""Named deltas on one model: every switch is exact, all or nothing, and O(B)."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import hypothesis
import pytest
import torch
from delta_kit import Bag, finite, make_delta, random_bits, snapshot, subset
from hypothesis import strategies as st
from torch import nn

import selectune
from selectune import bits
from selectune.delta import Delta, Shelf, switch
from selectune.delta.live.writing import Write, write_all
from selectune.errors import BaseMismatchError, ConfigError, DeltaStateError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float64]


class Tied(nn.Module):
    """Any bits at all in every tensor, two names for one weight, a buffer and a head that deltas write whole."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(random_bits((6, 5), dtype, seed), requires_grad=False)
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(random_bits((5, 7), dtype, seed + 1).t(), requires_grad=False)
        self.inner.bias = nn.Parameter(random_bits((9,), dtype, seed + 2), requires_grad=False)
        self.head = nn.Parameter(random_bits((2, 3), dtype, seed + 3), requires_grad=False)
        self.out = self.embed
        self.register_buffer("count", torch.tensor(seed))


def deltas_on(model: Tied, count: int, seed: int) -> dict[str, Delta]:
    made = {}
    dtype = model.embed.dtype
    for number in range(count):
        own = seed + 10 * number
        sizes = {"embed": 30, "inner.weight": 35, "inner.bias": 9}
        support = {name: subset(size, (own + size) % size + 1, own) for name, size in sizes.items()}
        values = {name: finite(len(where), dtype, own + 1) for name, where in support.items()}
        dense = {}
        if number % 2:
            dense = {"head": finite(6, dtype, own + 2).reshape(2, 3), "count": torch.tensor(own)}
        made[f"d{number}"] = make_delta(model, support, values, dense=dense, old_values=number % 3 == 0)
    return made


def alone(model: nn.Module, delta: Delta) -> dict:
    fresh = copy.deepcopy(model)
    delta.apply(fresh)
    return snapshot(fresh)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_switches_leave_the_base_bit_identical(dtype, tries):
    tries(1000)
    model, rng = Tied(dtype, 3), random.Random(0)
    base, deltas = snapshot(model), deltas_on(model, 5, 7)
    states = {name: alone(model, delta) for name, delta in deltas.items()} | {None: base}
    shelf = Shelf(model, deltas)
    for number in range(1000):
        name = rng.choice(list(states))
        switch(model, name)
        assert shelf.active == name
        if number % 20 == 0:
            assert snapshot(model) == states[name]
    switch(model, None)
    assert snapshot(model) == base
    assert all(delta.verify(model).ok for delta in deltas.values())


@hypothesis.given(
    st.sampled_from(DTYPES), st.integers(0, 1000), st.integers(0, 4), st.lists(st.integers(0, 4), max_size=12)
)
def test_any_sequence_of_switches(dtype, seed, count, sequence):
    model = Tied(dtype, seed)
    base, deltas = snapshot(model), deltas_on(model, count, seed + 5)
    states = {None: base} | {name: alone(model, delta) for name, delta in deltas.items()}
    Shelf(model, deltas)
    for number in sequence:
        name = list(states)[number % len(states)]
        selectune.switch(model, name)
        assert snapshot(model) == states[name]
    selectune.switch(model, None)
    assert snapshot(model) == base


def line() -> tuple[Bag, dict[str, Delta]]:
    model = Bag({"w": torch.arange(6.0), "v": torch.ones(3)})

    def of(where: list[int], values: list[float]) -> Delta:
        return make_delta(model, {"w": torch.tensor(where)}, {"w": torch.tensor(values)})

    return model, {"a": of([0, 1], [10.0, 11.0]), "b": of([1, 2], [20.0, 21.0])}


def test_unknown_names_list_the_known_ones():
    model, deltas = line()
    Shelf(model, deltas)
    with pytest.raises(ConfigError, match=r"'c' here; known: a, b \(or None\)"):
        switch(model, "c")
    with pytest.raises(DeltaStateError, match="no deltas to switch between"):
        switch(nn.Linear(1, 1), "a")


@pytest.mark.parametrize("bad", [{"": None}, {"a": "runs/a"}, {1: None}], ids=str)
def test_what_is_no_shelf(bad):
    model, deltas = line()
    with pytest.raises(ConfigError, match="a shelf takes"):
        Shelf(model, {**deltas, **bad})


def test_a_delta_of_another_base_does_not_get_on_the_shelf():
    model, deltas = line()
    other = Bag({"w": torch.full((6,), 9.0), "v": torch.ones(3)})
    wrong = make_delta(other, {"w": torch.tensor([0])}, {"w": torch.tensor([1.0])})
    with pytest.raises(BaseMismatchError, match="not the base"):
        Shelf(model, {**deltas, "wrong": wrong})
    with pytest.raises(DeltaStateError, match="no deltas"):
        switch(model, "a")


def test_under_a_tuner():
    model, deltas = line()
    Shelf(model, deltas)
    tuner = selectune.attach(model.requires_grad_(), selectune.random(2))
    with pytest.raises(DeltaStateError, match="tuner is attached"):
        switch(model, "a")
    with pytest.raises(DeltaStateError, match="tuner is attached"):
        Shelf(model, deltas)
    tuner.detach()
    switch(model, "a")


def test_a_delta_that_was_applied_already():
    model, deltas = line()
    with deltas["a"].applied(model), pytest.raises(DeltaStateError, match="is applied to this model; revert it"):
        Shelf(model, deltas)
    shelf = Shelf(model, deltas)
    with deltas["b"].applied(model), pytest.raises(DeltaStateError, match="besides its shelf; revert it"):
        switch(model, "a")
    switch(model, "a")
    with pytest.raises(DeltaStateError, match="is applied to this model"):
        Shelf(model, deltas)
    deltas["b"].apply(model, stack=True)
    with pytest.raises(DeltaStateError, match="besides its shelf"):
        switch(model, None)
    deltas["b"].revert(model)
    deltas["a"].revert(model)  # by hand: the shelf sees that too
    assert shelf.active is None
    switch(model, "b")
    assert (shelf.active, shelf.names) == ("b", ("a", "b"))


@pytest.mark.parametrize("planned", [0, 1], ids=["first", "planned"])
@pytest.mark.parametrize("at", [0, 1], ids=["where a writes alone", "where both write"])
def test_a_value_of_the_delta_in_place_that_moved(at, planned):
    model, deltas = line()
    Shelf(model, deltas)
    for name in ("b", "a") * planned:
        switch(model, name)
    switch(model, "a")
    with torch.no_grad():
        model.w[at] = -7.0
    before = snapshot(model)
    for name in ("b", None, "a"):
        with pytest.raises(DeltaStateError, match=r'model changed since.*"w"'):
            switch(model, name)
    assert snapshot(model) == before


@pytest.mark.parametrize("planned", [0, 1], ids=["first", "planned"])
def test_a_base_that_changed_where_the_coming_delta_writes(planned):
    model, deltas = line()
    shelf = Shelf(model, deltas)
    for name in ("b", "a") * planned:
        switch(model, name)
    switch(model, "a")
    with torch.no_grad():
        model.w[2] = -7.0
    before = snapshot(model)
    with pytest.raises(BaseMismatchError, match="not the base"):
        switch(model, "b")
    assert snapshot(model) == before
    assert shelf.active == "a"
    with torch.no_grad():
        model.v[0] = 5.0  # no delta writes there: O(B) cannot see it
    switch(model, None)
    assert model.w.tolist() == [0.0, 1.0, -7.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("planned", [0, 1], ids=["first", "planned"])
def test_weights_loaded_meanwhile_are_the_base_again(planned):
    model, deltas = line()
    state = copy.deepcopy(model.state_dict())
    shelf = Shelf(model, deltas)
    for name in ("b", "a") * planned:
        switch(model, name)
    switch(model, "a")
    model.load_state_dict(state)
    with shelf.using("a"):
        assert model.w.tolist()[:2] == [10.0, 11.0]
    model.load_state_dict(state)
    switch(model, "b")
    assert shelf.active == "b"
    switch(model, None)
    assert torch.equal(model.w, state["w"])


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_switch_is_all_or_nothing(monkeypatch, error):
    model = Tied(torch.float32, 1)
    deltas = deltas_on(model, 2, 4)
    shelf = Shelf(model, deltas)
    switch(model, "d0")
    before = snapshot(model)
    for k in range(20):
        left = [k]

        def failing(real, left=left):
            def write(*args):
                left[0] -= 1
                real(*args)
                if left[0] == -1:
                    raise error

            return write

        with monkeypatch.context() as patched:
            for name in ("scatter", "overwrite"):
                patched.setattr(bits, name, failing(getattr(bits, name)))
            try:
                switch(model, "d1")
                break
            except error:
                assert (snapshot(model), shelf.active) == (before, "d0")
    assert k == 8  # three patches off, three patches and two whole tensors on
    assert shelf.active == "d1"


def test_an_interrupt_after_the_last_write_undoes_the_record_too():
    class Record(list):
        def __setitem__(self, where, what):
            super().__setitem__(where, what)
            if what:
                raise KeyboardInterrupt

    record, weights = Record(), torch.zeros(3)
    with pytest.raises(KeyboardInterrupt):
        write_all([Write("w", weights, None, torch.ones(3), torch.zeros(3))], record, ["applied"])
    assert (record, weights.sum()) == ([], 0.0)


def test_a_switch_writes_what_the_deltas_write_and_no_more(monkeypatch):
    model, deltas = line()
    Shelf(model, deltas)
    written = []
    real = bits.scatter
    monkeypatch.setattr(
        bits, "scatter", lambda tensor, where, new: (written.append(len(where)), real(tensor, where, new))
    )
    for _ in range(2):  # the second time as planned
        for name in ("a", "b", None):
            switch(model, name)
    assert written == [2, 2, 2, 2] * 2


def test_the_shelf_does_not_keep_its_model():
    model, deltas = line()
    shelf, gone = Shelf(model, deltas), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(DeltaStateError, match="gone"):
        shelf.switch("a")


def test_a_compiled_or_wrapped_model_is_the_same_model():
    model, deltas = line()
    Shelf(model, deltas)
    wrapper = nn.Module()
    wrapper.module = model
    switch(wrapper, "a")
    assert model.w.tolist()[:2] == [10.0, 11.0]


def test_a_delta_alone_is_no_shelf():
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match=r"takes \{name: delta\}.*got Delta"):
        Shelf(model, selectune.diff(model, nn.Linear(2, 1)))  # pyright: ignore[reportArgumentType]
