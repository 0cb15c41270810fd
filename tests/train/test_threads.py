"""Other threads may read the model while one trains it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from train_kit import bits, same

import selectune as st

X = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(0))


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
