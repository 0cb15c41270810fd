"""Schedules: the vectors of the papers' rulings, and properties over any budget and any number of steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

import selectune as st
from selectune.schedule import DropGrow, Increment, OneShot, Quotas, Repeat, resolve_budget


def quotas(schedule, steps):
    targets = [schedule.target(t) for t in range(steps)]
    return [b - a for a, b in zip([0, *targets], targets, strict=False)]


@pytest.mark.parametrize(
    ("budget", "steps", "spread", "expected"),
    [
        (10, 4, "cumulative", [2, 3, 2, 3]),
        (10, 4, "front", [3, 3, 2, 2]),
        (3, 5, "cumulative", [0, 1, 0, 1, 1]),
        (3, 5, "front", [1, 1, 1, 0, 0]),
    ],
)
def test_quotas_of_a_budget_that_the_steps_do_not_divide(budget, steps, spread, expected):
    assert quotas(Increment(budget, steps, spread=spread), steps) == expected


def test_update_counts_of_the_theorem():
    def updates(schedule, steps):
        return sum(u * (steps - t) for t, u in enumerate(quotas(schedule, steps)))

    assert updates(Increment(12, 4), 4) == 30  # (T + 1) B / 2, against T B = 48 for a static mask
    assert updates(OneShot(12), 4) == 48
    assert updates(Increment(10, 4), 4) == 24  # not 25: the equality holds only when T divides B


@given(
    some.integers(1, 500),
    some.integers(1, 60),
    some.integers(1, 70),
    some.sampled_from(["cumulative", "front"]),
)
def test_targets_rise_to_the_budget_and_stay(budget, steps, every, spread):
    schedule = Increment(budget, steps, every, spread)
    targets = [schedule.target(t) for t in range(steps + 5)]
    assert targets == sorted(targets)
    assert targets[steps - 1 :] == [budget] * 6
    every_step = Increment(budget, steps, 1, spread)
    for t in range(steps):
        if schedule.due(t):  # the quotas of this step and of the k - 1 after it
            assert schedule.target(t) == every_step.target(min(t + every, steps) - 1)


def test_a_list_of_quotas_is_a_schedule():
    assert quotas(Quotas([3, 0, 2]), 5) == [3, 0, 2, 0, 0]
    assert Quotas([3, 0, 2]).budget == 5


def test_repeat_asks_for_the_whole_budget_until_its_last_step():
    schedule = Repeat(7, 3)
    assert [schedule.due(t) for t in range(5)] == [True, True, True, False, False]
    assert schedule.target(0) == schedule.target(2) == 7


def test_budget_is_a_count_or_a_density():
    assert resolve_budget(0.0017, 1_000_000) == 1700
    assert resolve_budget(5, 5) == 5
    with pytest.raises(st.errors.BudgetError, match="larger than the 5 scalars"):
        resolve_budget(6, 5)
    with pytest.raises(st.errors.BudgetError, match="comes to 0"):
        resolve_budget(0.0001, 100)


@pytest.mark.parametrize("budget", [0, -3, 1.0, 0.0, 2.5, float("nan"), True, "10"])
def test_a_budget_that_is_none(budget):
    with pytest.raises(st.errors.BudgetError):
        st.pafi(budget)


@pytest.mark.parametrize("steps", [None, 0, -1, 2.0, True])
def test_a_method_without_its_steps(steps):
    with pytest.raises(st.errors.ScheduleError, match=r"steps= is .*needed, got"):
        st.id3(10, steps)
    with pytest.raises(st.errors.ScheduleError, match="every="):
        st.id3(10, 5, every=0)
    with pytest.raises(st.errors.ScheduleError, match="Known: cumulative, front"):
        st.id3(10, 5, spread="back")
    with pytest.raises(st.errors.ScheduleError, match="quotas must be"):
        Quotas([1, -1])


def test_the_closing_ticks_and_shares_of_drop_and_grow():
    """methods 2.12: S = 20, A = 5, T = 100, linear: closes at 5 (all), 25 (.15), 45 (.11), 65 (.07), 85 (.03)."""
    schedule = DropGrow(10, 100, every=20, window=5, fraction=0.2, decay="linear")
    shares = {c: schedule.share(c) for c in range(200) if schedule.due(c)}
    assert {c: str(s) for c, s in shares.items()} == {5: "1", 25: "3/20", 45: "11/100", 65: "7/100", 85: "3/100"}
    # covers the steps S .. S + A of a window (counted from 1), the first from construction on: A steps
    watched = [
        [t for t in range(c) if any(schedule.opens(o) and o <= t for o in range(max(0, c - 19), c))] for c in (5, 25)
    ]
    assert [len(w) for w in watched] == [5, 6]


@given(some.integers(1, 40), some.integers(0, 39), some.integers(1, 300), some.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_every_window_that_opens_closes(every, window, steps, until):
    schedule = DropGrow(1, steps, every, min(window, every - 1), until=until)
    due = [c for c in range(400) if schedule.due(c)]
    opened = [t for t in range(400) if schedule.opens(t)]
    assert all(0 < c < until * steps and c % every == schedule.window for c in due)
    assert len(opened) == (len(due) if schedule.window else 0)
    assert all(o < c <= o + schedule.window + 1 for o, c in zip(opened, due, strict=False))
    assert all(0 < schedule.share(c) <= 1 for c in due)


def test_drop_and_grow_refuses_what_makes_no_sense():
    for wrong in ({"every": 0}, {"window": 20}, {"window": -1}, {"fraction": 0.0}, {"until": 1.5}, {"decay": "step"},
                  {"drop": "all"}, {"steps": None}):  # fmt: skip
        with pytest.raises(st.errors.ScheduleError):
            DropGrow(**({"budget": 5, "steps": 50} | wrong))
