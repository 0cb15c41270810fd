"""Threads on one shelf: no torn answer through its door, the base bit for bit whatever they do, no deadlock."""

from __future__ import annotations

import contextlib
import random
import threading

import hypothesis
import pytest
import torch
from delta_kit import Bag, make_delta, snapshot, subset
from hypothesis import strategies as st
from test_shelf import line
from threads_kit import Beside, until
from torch import nn

from selectune import bits
from selectune.delta import Delta, Shelf, switch
from selectune.delta.combine import algebra
from selectune.delta.live import door
from selectune.errors import BaseMismatchError, ConfigError, DeltaStateError, DeltaTimeoutError


@pytest.fixture(autouse=True)
def empty():
    yield
    assert (door._INSIDE, door._WAITING) == ([], []), "somebody never left"


def wide(tensors: int = 6, size: int = 4096, count: int = 3, seed: int = 0) -> tuple[Bag, dict[str, Delta]]:
    """All deltas write many entries of this model, some of them the same. A torn state agrees with no delta."""
    model = Bag({f"w{number}": torch.zeros(size) for number in range(tensors)})
    deltas = {}
    for number in range(count):
        support = {name: subset(size, size // 2, seed + number) for name in dict(model.named_parameters())}
        values = {name: torch.full((size // 2,), 1.0 + number) for name in support}
        deltas[f"d{number}"] = make_delta(model, support, values)
    return model, deltas


def sums(model: nn.Module) -> tuple[float, ...]:
    """An answer that is read tensor by tensor; the interpreter's lock is released in between."""
    return tuple(float(tensor.detach().sum()) for tensor in model.parameters())


def answers(model: nn.Module, shelf: Shelf) -> dict[str | None, tuple[float, ...]]:
    known = {}
    for name in (None, *shelf.names):
        switch(model, name)
        known[name] = sums(model)
    switch(model, None)
    return known


def run(count: int, work) -> None:
    others = [Beside(lambda number=number: work(random.Random(number))) for number in range(count)]
    assert [other.raised() for other in others] == [[]] * count


def test_a_thousand_switches_beside_four_readers(tries):
    model, deltas = wide()
    base = snapshot(model)
    shelf = Shelf(model, deltas)
    known, over, read, torn = answers(model, shelf), threading.Event(), [0], []

    def reading(rng: random.Random) -> None:
        while not over.is_set():
            name = rng.choice(list(known))
            with shelf.using(name) as same:
                if sums(same) != known[name]:
                    torn.append(name)
            read[0] += 1

    readers = [Beside(lambda number=number: reading(random.Random(number))) for number in range(4)]
    rng = random.Random(9)
    for _ in range(1000):
        switch(model, rng.choice(list(known)))
    over.set()
    assert [reader.raised() for reader in readers] == [[]] * 4
    assert not torn
    tries(read[0])
    assert read[0] > 100
    switch(model, None)
    assert snapshot(model) == base


def test_switches_without_the_door_end_in_a_state_that_a_delta_gives():
    model, deltas = wide()
    base, shelf = snapshot(model), Shelf(model, deltas)
    known = answers(model, shelf)

    def work(rng: random.Random) -> None:
        for _ in range(60):
            switch(model, rng.choice(list(known)))
            sums(model)

    run(6, work)
    assert sums(model) == known[shelf.active]
    switch(model, None)
    assert snapshot(model) == base


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    st.integers(0, 100),
    st.lists(st.lists(st.tuples(st.sampled_from(["using", "switch", "applied", "verify", "swap"]), st.integers(0, 3)),
                      max_size=8), min_size=2, max_size=4),
)  # fmt: skip
def test_any_work_of_several_threads(seed, plans):
    model, deltas = wide(tensors=3, size=64, seed=seed)
    base, shelf = snapshot(model), Shelf(model, deltas)
    known, names = answers(model, shelf), [None, *deltas]

    def work(plan) -> None:
        for what, number in plan:
            name = names[number]
            if what == "using":
                with shelf.using(name):
                    assert sums(model) == known[name]
            elif what == "switch":
                switch(model, name)
            elif what == "swap" and name is not None:
                own = f"{name} of {threading.get_ident()}"
                shelf.add(own, deltas[name])
                with shelf.using(own):
                    assert sums(model) == known[name]
                shelf.remove(own)
            else:
                # either the shelf's delta is in place, and that is said, or the work is done
                with contextlib.suppress(DeltaStateError):
                    if what == "applied" and name is not None:
                        with deltas[name].applied(model):
                            assert sums(model) == known[name]
                    elif name is not None:
                        assert deltas[name].verify(model).ok

    others = [Beside(lambda plan=plan: work(plan)) for plan in plans]
    assert [other.raised() for other in others] == [[]] * len(plans)
    switch(model, None)
    assert snapshot(model) == base


def test_apply_and_revert_in_several_threads():
    model, deltas = wide()
    base, torn = snapshot(model), []
    known = {}
    for name, delta in deltas.items():
        with delta.applied(model):
            known[name] = sums(model)

    def work(rng: random.Random) -> None:
        for _ in range(40):
            name = rng.choice(list(deltas))
            with contextlib.suppress(DeltaStateError):  # an apply() of another thread, between two blocks
                with deltas[name].applied(model):
                    if sums(model) != known[name]:
                        torn.append(name)
                done[0] += 1
            with contextlib.suppress(DeltaStateError):
                deltas[name].apply(model)
                deltas[name].revert(model)
                done[1] += 1

    done = [0, 0]
    run(4, work)
    assert not torn
    assert min(done) > 0  # how often the threads meet is the machine's affair
    assert snapshot(model) == base


class Planted(Exception):
    pass


def test_failing_writes_in_several_threads(monkeypatch):
    model, deltas = wide()
    base, shelf = snapshot(model), Shelf(model, deltas)
    known, luck, failed, torn = answers(model, shelf), random.Random(1), [0], []

    def failing(real):
        def write(*args):
            if luck.random() < 0.02:
                real(*args) if luck.random() < 0.5 else None
                failed[0] += 1
                raise Planted
            real(*args)

        return write

    for way in ("scatter", "overwrite"):
        monkeypatch.setattr(bits, way, failing(getattr(bits, way)))

    def work(rng: random.Random) -> None:
        for _ in range(80):
            name = rng.choice(list(known))
            try:
                if rng.random() < 0.3:
                    switch(model, name)
                    continue
                with shelf.using(name):
                    if sums(model) != known[name]:
                        torn.append(name)
                    if rng.random() < 0.1:
                        raise Planted
            except Planted:
                pass

    run(4, work)
    assert failed[0] > 20
    assert not torn
    monkeypatch.undo()
    switch(model, None)
    assert snapshot(model) == base


def test_what_cannot_be_put_back_is_said(monkeypatch):
    model, deltas = wide(tensors=2)
    shelf = Shelf(model, deltas)
    real, count = bits.scatter, [0]

    def failing(tensor, *args):
        count[0] += 1
        if tensor is not model.w1 or count[0] == 2:
            real(tensor, *args)
        if tensor is model.w1:
            raise Planted

    monkeypatch.setattr(bits, "scatter", failing)
    with pytest.raises(DeltaStateError, match=r'putting back what was there, in "w1"') as raised:
        switch(model, "d0")
    assert isinstance(raised.value.__cause__, Planted)
    assert count[0] == 2 + 3 + 1  # three tries at w1, and w0 is put back all the same
    assert sums(model) == (0.0, 2048.0)
    assert shelf.active is None


# --- the door ---


def test_readers_of_a_name_are_inside_together_and_others_queue():
    model, deltas = line()
    shelf, both = Shelf(model, deltas), threading.Barrier(2, timeout=20)
    seen = []

    def read(name: str) -> None:
        with shelf.using(name):
            seen.append((name, model.w[0].item()))

    def together() -> None:
        with shelf.using("a"):
            both.wait()

    assert [one.raised() for one in [Beside(together), Beside(together)]] == [[], []]
    with shelf.using("a"):
        first = Beside(lambda: read("b"))
        until(lambda: len(door._WAITING) == 1)
        second = Beside(lambda: read("a"))  # could read now, but b asked before
        until(lambda: len(door._WAITING) == 2)
        assert seen == []
        assert shelf.active == "a"
    assert (first.raised(), second.raised()) == ([], [])
    assert seen == [("b", 0.0), ("a", 10.0)]
    assert shelf.active == "a"  # left in place


def test_a_switch_waits_for_readers_and_a_timeout_ends_the_wait():
    model, deltas = line()
    shelf = Shelf(model, deltas)
    with shelf.using("a"):
        for work in (lambda: switch(model, "b", timeout=0.01), lambda: shelf.using("b", 0.01).__enter__()):
            [error] = Beside(work).raised()
            assert isinstance(error, DeltaTimeoutError)
        assert [Beside(lambda: shelf.using("a", 0).__enter__() and None).raised()] == [[]]  # no wait, no timeout
        waiting = Beside(lambda: switch(model, "b"))
        until(lambda: door._WAITING)
        assert model.w[0] == 10.0
    assert waiting.raised() == []
    assert shelf.active == "b"
    with pytest.raises(ConfigError, match="number of seconds"):
        switch(model, "a", timeout=-1)


def test_inside_a_block_of_the_same_thread():
    model, deltas = line()
    shelf = Shelf(model, deltas)
    with shelf.using("a"), shelf.using("a"):
        before = snapshot(model)
        for work in (
            lambda: shelf.using("b").__enter__(),
            lambda: shelf.using(None).__enter__(),
            lambda: switch(model, "b"),
            lambda: switch(model, "a"),
            lambda: deltas["b"].apply(model, stack=True),
            lambda: deltas["a"].revert(model),
            lambda: deltas["a"].merge(model),
            lambda: deltas["a"].verify(model),
            lambda: Shelf(model, deltas),
            lambda: shelf.remove("a"),
        ):
            with pytest.raises(DeltaStateError, match=r"would wait for ever: this thread is inside using\('a'\)"):
                work()
        algebra.scale(deltas["b"], 2.0, base=model)  # reads only
        shelf.add("c", deltas["b"])
        shelf.remove("b")
        waiting = Beside(lambda: switch(model, "c"))
        until(lambda: door._WAITING)
        with shelf.using("a"):  # does not queue behind the switch that waits for the outer block
            assert snapshot(model) == before
    assert waiting.raised() == []
    with shelf.using("c"), pytest.raises(DeltaStateError, match="inside using"):
        shelf.switch(None)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_in_a_block_or_a_write_leave_the_door_open(monkeypatch, error):
    model, deltas = line()
    shelf = Shelf(model, deltas)
    with pytest.raises(error), shelf.using("a"):
        raise error

    def fail(*args):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(bits, "scatter", fail)
        with pytest.raises((error, DeltaStateError)), shelf.using("b"):
            pytest.fail("inside")  # pragma: no cover
    assert Beside(lambda: switch(model, "b")).raised() == []


def test_a_reader_of_a_name_whose_weights_moved_is_told():
    model, deltas = line()
    base, shelf = model.w.detach().clone(), Shelf(model, deltas)
    for name in ("a", "b", "a"):
        switch(model, name)
    with torch.no_grad():
        model.w.copy_(base)  # as loading the base's weights does: the delta is put in place again
    with shelf.using("a"):
        assert model.w[0] == 10.0
        with torch.no_grad():
            model.w[0] = 7.0
        with pytest.raises(DeltaStateError, match="the weights changed in that block"), shelf.using("a"):
            pass
    with pytest.raises(DeltaStateError, match="model changed since"), shelf.using("a"):
        pass


# --- a living shelf ---


def test_add_and_remove():
    model, deltas = line()
    shelf = Shelf(model, {"a": deltas["a"]})
    switch(model, "a")
    shelf.add("b", deltas["b"])  # the base is looked for under the delta in place
    with pytest.raises(ConfigError, match="'b' here already"):
        shelf.add("b", deltas["b"])
    with pytest.raises(ConfigError, match="a shelf takes"):
        shelf.add("c", "runs/c")  # pyright: ignore[reportArgumentType]
    other = Bag({"w": torch.full((6,), 9.0), "v": torch.ones(3)})
    wrong = make_delta(other, {"w": torch.tensor([0])}, {"w": torch.tensor([1.0])})
    with pytest.raises(BaseMismatchError):
        shelf.add("c", wrong)
    assert shelf.names == ("a", "b")
    switch(model, "b")
    shelf.remove("a")
    assert shelf.active == "b"
    shelf.remove("b")
    assert (shelf.names, shelf.active) == ((), None)
    assert model.w.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(ConfigError, match="known: none"):
        shelf.remove("b")
    shelf.add("b", deltas["b"])
    with deltas["a"].applied(model), pytest.raises(DeltaStateError, match="besides its shelf"):
        shelf.add("a", deltas["a"])
    switch(model, "b")
    deltas["a"].apply(model, stack=True)
    with pytest.raises(DeltaStateError, match="besides its shelf"):
        shelf.remove("b")
    assert shelf.names == ("b",)


def test_a_delta_is_removed_once_its_readers_are_gone():
    model, deltas = line()
    shelf = Shelf(model, deltas)
    with shelf.using("a"):
        leaving = Beside(lambda: shelf.remove("a"))
        until(lambda: door._WAITING)
        late = Beside(lambda: switch(model, "a"))
        until(lambda: len(door._WAITING) == 2)
        assert model.w[0] == 10.0
    assert leaving.raised() == []
    assert [type(error) for error in late.raised()] == [ConfigError]
    assert (shelf.names, shelf.active) == (("b",), None)
