"""After any events between two steps, a fresh tuner accepts the run's state and continues as the run does."""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch
from test_rollback import CASES, Run, same_state
from train_kit import bits, same

import selectune as st
from selectune.errors import NonFiniteError, TunerError

MORE = {
    **CASES,
    "id3, every 3": (lambda: st.id3(30, 6, every=3), CASES["id3"][1], 2),
    "static-d3": (lambda: st.static_d3(30), CASES["id3"][1], 1),
    "repeat-d3, every 2": (lambda: st.repeat_d3(30, 4, every=2), CASES["id3"][1], 2),
    "id3, tensors apart": (lambda: st.id3(31, 5, scope=st.Scope(exclude=("norm.*",))), CASES["id3"][1], 1),
}
WALKS = int(os.environ.get("WALKS", "1"))
ACTIONS = ("step", "step", "step", "forward", "evaluation", "thrown away", "not finite", "short", "a head only")


def act(run, action, number):
    """One thing that happens in a run; what it leaves open is closed by the next."""
    if action == "step":
        for k in range(run.accumulation):
            run.backward(100 * number + k)
        run.optimizer.step()
    elif action == "short":  # the last window of an epoch
        run.backward(100 * number)
        run.optimizer.step()
    elif action == "forward":
        run.model(torch.ones(4, 6))
    elif action == "evaluation":
        with torch.no_grad():
            run.model(torch.ones(4, 6))
    elif action == "thrown away":
        for k in range(run.accumulation):
            run.backward(100 * number + k)
    elif action == "not finite":  # as a scaler sees it: the step is skipped
        for _ in range(run.accumulation):
            (run.model(torch.ones(4, 6)) * float("inf")).sum().backward()
    elif action == "a head only":
        for _ in range(run.accumulation):
            run.model.last(torch.ones(4, 12)).sum().backward()
        run.optimizer.step()
    run.optimizer.zero_grad()


@pytest.mark.parametrize("case", MORE)
def test_every_state_of_a_walk_is_taken(case, tries):
    taken = 0
    for seed in range(WALKS):
        draw = random.Random(f"{case} {seed}")
        run = Run(*MORE[case])
        for number in range(9):
            action = draw.choice(ACTIONS)
            try:
                act(run, action, number)
                state = run.tuner.state_dict()
            except (TunerError, NonFiniteError):  # an open window, or a phase that ended in NaN
                break
            moments = copy.deepcopy(run.optimizer.state_dict())
            fresh = Run(*MORE[case])
            fresh.tuner.load_state_dict(state)
            same_state(fresh.tuner.state_dict(), state)
            taken += 1
            fresh.optimizer.load_state_dict(moments)
            if number % 3 == 2:
                for run_on in (run, fresh):
                    act(run_on, "step", 50 + number)
                assert same(bits(run.model), bits(fresh.model)), (seed, number, action)
    tries(taken)
