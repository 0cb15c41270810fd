"""The door admits readers together and writers alone, in the order of asking. It refuses waits without end."""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from threads_kit import Beside, until
from torch import nn

from selectune.delta.live import door
from selectune.delta.live.door import Hold, alone, beside, claim_of, enter, leave
from selectune.errors import ConfigError, DeltaStateError, DeltaTimeoutError

MODELS = nn.Linear(1, 1), nn.Linear(1, 1)  # kept alive: a claim speaks of addresses
CLAIM, OTHER = claim_of(MODELS[0]), claim_of(MODELS[1])


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    yield
    assert (door._INSIDE, door._WAITING) == ([], []), "somebody never left"


# --- what excludes what ---


def test_parts_wholes_and_tied_weights_meet():
    inner, other = nn.Linear(3, 3), nn.Linear(3, 3)
    whole, act = nn.Sequential(inner, nn.ReLU()), nn.ReLU()
    assert claim_of(whole).meets(claim_of(inner))
    assert not claim_of(whole).meets(claim_of(other))
    assert not claim_of(nn.Sequential(act, MODELS[0])).meets(claim_of(nn.Sequential(MODELS[1], act)))
    other.bias = inner.bias
    assert claim_of(other).meets(claim_of(whole))
    view, empty = nn.Module(), nn.Module()
    view.rows = nn.Parameter(inner.weight.detach()[1:])  # other memory address, same memory
    assert claim_of(view).meets(claim_of(inner))
    assert not claim_of(empty).meets(claim_of(view))
    columns, rest = nn.Module(), nn.Module()
    columns.w = nn.Parameter(inner.weight.detach()[:, 1])
    rest.w = nn.Parameter(inner.weight.detach()[2:, 2])
    assert claim_of(columns).meets(claim_of(inner))
    assert not claim_of(rest).meets(claim_of(columns))


def test_tensors_without_an_address_are_known_by_themselves():
    one, two = nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta")
    assert not claim_of(one).meets(claim_of(two))
    two.weight = one.weight
    assert claim_of(one).meets(claim_of(two))
    sparse = nn.Module()
    sparse.register_buffer("eye", torch.eye(2).to_sparse())
    assert claim_of(sparse).meets(claim_of(sparse))


# --- turns ---


def test_turns_come_in_the_order_of_asking():
    claim, order = CLAIM, []

    def turn(name: str, reads: bool) -> None:
        hold = Hold(claim, name)
        enter(hold, lambda: reads)
        order.append(name)
        leave(hold)

    others = []
    with beside(claim, "first"):
        for number, reads in enumerate((False, True, False, True, True)):
            others.append(Beside(lambda number=number, reads=reads: turn(str(number), reads)))
            until(lambda count=number + 1: len(door._WAITING) == count)
        assert order == []  # not even the readers, who could read beside the first
    assert [other.raised() for other in others] == [[]] * 5
    assert order[:3] == ["0", "1", "2"]


def test_readers_are_inside_together_and_a_writer_alone():
    claim = CLAIM
    both = threading.Barrier(2, timeout=20)

    def read() -> None:
        with beside(claim, "reading"):
            both.wait()

    assert [reader.raised() for reader in (Beside(read), Beside(read))] == [[], []]
    with alone(claim, "writing"):
        [error] = Beside(lambda: enter(Hold(claim, "late"), lambda: True, door.deadline(0.01))).raised()
    assert isinstance(error, DeltaTimeoutError)
    assert isinstance(error, TimeoutError)
    assert "late waited until its timeout for other threads (writing)" in str(error)


def test_models_that_do_not_meet_do_not_wait():
    with alone(CLAIM, "one"):
        assert Beside(lambda: use(OTHER)).raised() == []


def use(claim: door.Claim) -> None:
    with alone(claim, "use"):
        pass


def test_who_is_inside_may_enter_again_before_those_who_wait():
    part = nn.Linear(1, 1)
    whole = claim_of(nn.Sequential(part, nn.Linear(1, 1)))
    with alone(claim_of(part), "part"):
        other = Beside(lambda: use(whole))
        until(lambda: door._WAITING)
        with alone(whole, "whole"), alone(whole, "again"):
            pass
    assert other.raised() == []


def test_who_has_one_part_may_take_another_before_a_writer_of_the_whole():
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    whole = claim_of(nn.Sequential(one, two))
    with beside(claim_of(one), "one"):
        other = Beside(lambda: use(whole))
        until(lambda: door._WAITING)
        with beside(claim_of(two), "two"):
            pass
    assert other.raised() == []


def test_a_reader_that_wants_to_write_is_told():
    claim = CLAIM
    with beside(claim, "reading"), pytest.raises(DeltaStateError, match=r"writing would wait for ever.*inside reading"):
        enter(Hold(claim, "writing"))
    use(claim)


def test_two_threads_that_wait_for_each_other_are_told():
    one, two = CLAIM, OTHER

    def crosswise() -> None:
        with alone(two, "two"):
            ready.set()
            use(one)

    ready = threading.Event()
    with alone(one, "one"):
        other = Beside(crosswise)
        ready.wait(20)
        until(lambda: door._WAITING)
        with pytest.raises(DeltaStateError, match=r"would wait for ever.*waits for one of this one.*same order"):
            enter(Hold(two, "mine"))
    assert other.raised() == []


@pytest.mark.parametrize("bad", [-1, "3", float("nan"), True], ids=str)
def test_what_is_no_timeout(bad):
    with pytest.raises(ConfigError, match="number of seconds"):
        door.deadline(bad)


# --- interrupts ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_while_waiting_or_inside_leaves_the_door_right(monkeypatch, error):
    claim = CLAIM
    with pytest.raises(error), alone(claim, "one"):
        raise error

    def wait(timeout: object) -> None:
        raise error

    held = Hold(claim, "held", thread=-1)
    enter(held)
    with monkeypatch.context() as patched:
        patched.setattr(door._CHANGED, "wait", wait)
        with pytest.raises(error):
            use(claim)
    leave(held)
    leave(held)
    use(claim)


def test_interrupts_at_any_time_leave_the_door_right():
    """Asynchronous exceptions, such as an interrupt, are thrown into threads that enter and leave."""
    claim, over = CLAIM, threading.Event()
    inside = [0, 0]  # writers, readers
    wrong: list[str] = []

    def turns(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            try:
                if rng.random() < 0.5:
                    with alone(claim, "writing"):
                        others = [hold for hold in tuple(door._INSIDE) if hold.thread != threading.get_ident()]
                        if others:
                            wrong.append(str(others))
                else:
                    with beside(claim, "reading"):
                        if any(not hold.shared for hold in tuple(door._INSIDE)):
                            wrong.append("beside a writer")
            except KeyboardInterrupt:
                inside[0] += 1

    threads = [threading.Thread(target=turns, args=(seed,), daemon=True) for seed in range(4)]
    for one in threads:
        one.start()
    end, rng = time.monotonic() + 2, random.Random(0)
    while time.monotonic() < end:
        victim = rng.choice(threads)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(victim.ident or 0), ctypes.py_object(KeyboardInterrupt)
        )
        time.sleep(0.0005)
    over.set()
    for one in threads:
        one.join(20)
    assert not wrong
    assert inside[0] > 100
    assert (door._INSIDE, door._WAITING) == ([], [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_not_kept_waiting_by_threads_that_it_does_not_have():
    claim, inside, over = CLAIM, threading.Event(), threading.Event()

    def hold() -> None:
        with alone(claim, "held"):
            inside.set()
            over.wait(20)

    other = Beside(hold)
    inside.wait(20)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            enter(Hold(claim, "in the child"), until=door.deadline(5))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    over.set()
    assert other.raised() == []
