"""More than one process is refused. Other threads may read the model while one trains it."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from train_kit import bits, same

import selectune as st
from selectune.errors import TunerError

X = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(0))


def group(monkeypatch, ranks):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *group: ranks)


def test_a_group_of_two_is_refused_at_attach_and_nothing_is_touched(monkeypatch):
    group(monkeypatch, 2)
    model = nn.Linear(8, 8)
    with pytest.raises(TunerError, match=r"belongs to a group of 2.*Train in one process"):
        st.attach(model, st.id3(budget=5, steps=2))
    assert all(p.requires_grad and type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize("when", ["forward", "step"])
def test_a_group_that_comes_later_is_refused_at_the_first_step(monkeypatch, when):
    model = nn.Linear(8, 8)
    tuner = st.attach(model, st.id3(budget=5, steps=2))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    loss = model(X[0]).square().mean()
    loss.backward()
    group(monkeypatch, 2)
    with pytest.raises(TunerError, match="group of 2"):
        model(X[0]) if when == "forward" else optimizer.step()


def test_a_group_of_one_is_one_process(monkeypatch):
    group(monkeypatch, 1)
    model = nn.Linear(8, 8)
    tuner = st.attach(model, st.id3(budget=5, steps=1))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    model(X[0]).square().mean().backward()
    optimizer.step()
    assert tuner.verify().selected == 5


@pytest.mark.parametrize("gradients", [False, True], ids=["evaluating", "with gradients on"])
def test_forward_passes_in_other_threads_do_not_disturb_the_one_that_trains(gradients):
    def run(threads):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 2))
        tuner = st.attach(model, st.id3(budget=60, steps=40))
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        stop, errors = threading.Event(), []

        def look():
            try:
                while not stop.is_set():
                    with torch.set_grad_enabled(gradients):
                        assert model(X[0]).isfinite().all()
            except Exception as error:  # noqa: BLE001  (whatever it is, the test shows it)
                errors.append(error)

        lookers = [threading.Thread(target=look) for _ in range(threads)]
        try:
            for step in range(40):
                model(X[step]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 0:  # the thread that trains is known
                    for looker in lookers:
                        looker.start()
        finally:
            stop.set()
            for looker in lookers:
                looker.join()
        assert not errors
        assert (tuner.step, tuner.verify().selected) == (40, 60)
        return bits(model), dict(tuner.events)

    alone, events = run(0)
    watched, others = run(2)
    assert events == others
    if not gradients:  # else gradients of a tensor may be summed in another order
        assert same(alone, watched)


def test_training_goes_on_in_another_thread_once_the_first_has_ended():
    model = nn.Linear(8, 8)
    tuner = st.attach(model, st.id3(budget=20, steps=4))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)

    def train(step):
        model(X[step]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(4):
        thread = threading.Thread(target=train, args=(step,))
        thread.start()
        thread.join()
    assert (tuner.step, tuner.verify().selected) == (4, 20)
