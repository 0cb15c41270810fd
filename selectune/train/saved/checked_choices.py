"""Checks the part of a state that says what was chosen when against what the schedule can have asked for by then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selectune.errors import ConfigError
from selectune.train.choose.chooser import Chooser
from selectune.train.choose.dropping import Dropping
from selectune.train.choose.growing import Afresh, Growing
from selectune.train.engine import Engine
from selectune.train.saved.forms import ascends, fits, need
from selectune.train.support.positions import LedgerPositions
from selectune.types import Phased, Reads, Schedule

EVENTS = ("skipped_steps", "broken_windows", "short_windows", "nonfinite_selections", "shortfall", "zero_scores")
_LOST = ("broken_windows", "nonfinite_selections", "shortfall")  # after these, fewer are selected than were asked for
_LOOK = 10_000  # how many past steps are searched for a selection


def check_choices(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ConfigError if the chooser's part is not one that this run can have come to by the state's step."""
    state, chooser, step = info["chooser"], engine.chooser, info["step"]
    form = _form(chooser)
    need(
        fits({"queue": None, **state}, form),
        f"The state's \"chooser\" has {sorted(map(ascii, state))}; this method's has {sorted(form)}, in another form.",
    )
    need(
        -1 <= state["ahead"] <= step,
        f'The state\'s "chooser" chose last before step {state["ahead"]!r}; the state is of step {step}.',
    )
    selected = engine.budget - int(tensors["free"].numel())
    _number(engine, info, selected)
    _new_entries(engine, info, tensors)
    _order(engine, info, tensors, selected)
    if isinstance(chooser, Dropping):
        _window(chooser, info)
        _factors(chooser, step, state["factors"])


def _form(chooser: Chooser) -> dict[str, Any]:
    index, wide = torch.int64, chooser.ledger.offsets.dtype
    news = {"slots": index, "mean": (None, wide), "square": (None, wide), "age": int}
    form = {"ahead": int, "news": (None, news), "queue": (None, [index, index])}
    if isinstance(chooser, Dropping):
        window = {"steps": int, "watched": dict, "sum": dict, "square": dict}
        form |= {"window": window, "factors": (None, [wide, wide])}
    return form


def _number(engine: Engine, info: Mapping[str, Any], selected: int) -> None:
    """As many are selected as the schedule has asked for; fewer only if the events say that some were not found."""
    step, asked = info["step"], _asked(engine, info["step"], info["chooser"]["ahead"])
    lost = any(info["events"].get(name, 0) for name in _LOST)
    if asked is not None and (selected > asked or (selected < asked and not lost)):
        raise ConfigError(
            f"The state has {selected:,} entries selected at step {step}; by then the schedule has asked for {asked:,}"
            + (", and no selection fell short." if selected < asked else ".")
        )


def _asked(engine: Engine, step: int, ahead: int) -> int | None:
    schedule, chooser = engine.schedule, engine.chooser
    if schedule is None or isinstance(chooser, Dropping):
        return engine.budget
    if isinstance(schedule, Phased):
        return schedule.target(step)
    if chooser.score.reads is not Reads.GRADIENT and ahead == step and schedule.due(step):
        return schedule.target(step)
    return _before(schedule, step)


def _before(schedule: Schedule, step: int) -> int | None:
    """How many the last selection before a step asked for; None if it lies too far back."""
    for past in range(step - 1, max(-1, step - 1 - _LOOK), -1):
        if schedule.due(past):
            return schedule.target(past)
    return 0 if step <= _LOOK else None


def _new_entries(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    state, chooser, step = info["chooser"], engine.chooser, info["step"]
    new, chosen = state["news"], state["ahead"] == step
    due = engine.schedule is not None and engine.schedule.due(step)
    in_backward = chooser.score.reads is Reads.GRADIENT
    if new is None:
        missing = isinstance(chooser, Afresh) and not in_backward and chosen and due
        need(not missing, f"The state's entries were chosen for step {step}, and which of them are new is not said.")
        return
    can = isinstance(chooser, Afresh | Dropping) and (not in_backward or _has_window(chooser))
    need(can, "The state has new entries, and this method has none between steps.")
    need(chosen and due, f"The state has new entries, and none were chosen for step {step}.")
    slots, mean, square, age = (new[part] for part in ("slots", "mean", "square", "age"))
    watched = mean is not None
    need(
        watched == (square is not None) and (not watched or slots.shape == mean.shape == square.shape),
        "The state's new entries have parts that do not fit each other.",
    )
    need(
        0 < age <= step if watched else age == 0,
        f"The state's new entries were watched for {age} steps, which cannot be at step {step}.",
    )
    need(
        ascends(torch.sort(slots).values, engine.budget),
        "The state's new entries name slots that do not exist, or one twice.",
    )
    need(
        not bool(torch.isin(slots.cpu(), tensors["free"].cpu()).any()),
        "The state's new entries name slots that no entry has.",
    )


def _has_window(chooser: Chooser) -> bool:
    return isinstance(chooser, Dropping) and chooser.schedule.window > 0


# -- orders known beforehand


def _order(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor], selected: int) -> None:
    chooser, order, step = engine.chooser, info["chooser"].get("queue"), info["step"]
    schedule = engine.schedule if type(chooser) is Growing else None
    ordered = schedule is not None and chooser.score.reads not in (Reads.GRADIENT, Reads.CHANGE)
    if order is None:
        need(not ordered or not selected, "The state has no queue of entries to select, and some are selected already.")
        return
    if schedule is None or not ordered or not isinstance(chooser, Growing):
        raise ConfigError("The state has a queue of entries to select, and this method has none.")
    which, flat = (part.cpu() for part in order)
    sizes = torch.tensor([t.form.numel() for t in engine.ledger.tensors])
    fits_scope = which.shape == flat.shape and not bool(((which < 0) | (which >= len(sizes))).any())
    need(
        fits_scope and not bool(((flat < 0) | (flat >= sizes[which])).any()),
        "The state's queue of entries to select names entries that do not exist.",
    )
    begins = torch.cumsum(sizes, 0) - sizes
    mine = [tensors[f"page.{t.index}.flat"].cpu() + begins[t.index] for t in engine.ledger.tensors]
    entries = torch.cat([begins[which] + flat, *mine])
    need(
        torch.unique(entries).numel() == entries.numel(),
        "The state's queue of entries to select names one twice, or one that is selected.",
    )
    left, lost = engine.budget - selected, info["events"].get("nonfinite_selections", 0)
    need(
        flat.numel() == left or (flat.numel() < left and lost),
        f"The state's queue has {flat.numel():,} entries to select; {left:,} of the budget are left.",
    )
    before = _before(schedule, step) if info["chooser"]["ahead"] == step else None
    need(
        before is None or not bool(tensors["offsets"][before:selected].any()),
        f"The state's entries of step {step} are trained already, before that step.",
    )
    _same_order(engine, chooser, which, flat)


def _same_order(engine: Engine, chooser: Growing, which: Tensor, flat: Tensor) -> None:
    """An order by weights or by draws is the same in every process on a CPU, so it is computed again."""
    if chooser.score.reads not in (Reads.WEIGHT, Reads.NOTHING) or engine.ledger.offsets.device.type != "cpu":
        return
    for theirs, mine in zip((which, flat), chooser.expected() or (), strict=False):
        count = min(theirs.numel(), mine.numel())
        need(
            torch.equal(theirs[theirs.numel() - count :], mine.cpu()[mine.numel() - count :]),
            "The state's queue of entries to select is not in the order that the weights give.",
        )


# -- drop and grow


def _window(chooser: Dropping, info: Mapping[str, Any]) -> None:
    window, step, schedule = info["chooser"]["window"], info["step"], chooser.schedule
    steps, watched, wide = window["steps"], window["watched"], chooser.ledger.offsets.dtype
    need(0 <= steps <= step, f"The state's window has been open for {steps} steps, which cannot be at step {step}.")
    sizes = {str(tensor.index): tensor.form.numel() for tensor in chooser.tensors}
    need(watched.keys() <= sizes.keys(), f"The state's watched entries are of tensors {sorted(watched)!r:.80}.")
    need(
        fits(watched, dict.fromkeys(watched, torch.int64))
        and all(fits(window[part], {i: flat.to(wide) for i, flat in watched.items()}) for part in ("sum", "square")),
        "The state's watched entries and their gradients are not of the same tensors, or differ in number.",
    )
    if steps == 0:
        return need(not watched, "The state's watched entries are of no window.")
    due = any(schedule.due(past) for past in range(step - steps + 1, step))
    used = info["chooser"]["ahead"] == step and schedule.due(step)
    reads = chooser.score.reads is Reads.GRADIENT and _has_window(chooser)
    need(
        reads and schedule.opens(step - steps) and not due and not used,
        f"The state's window has been open for {steps} steps, which the schedule has not at {step}.",
    )
    need(
        all(ascends(flat, sizes[index]) for index, flat in watched.items()),
        "The state's watched entries leave their tensor, do not ascend, or one occurs twice.",
    )


def _factors(chooser: Dropping, step: int, factors: list[Tensor] | None) -> None:
    wanted = chooser.score.reads is Reads.FACTORS and step > 0
    if not wanted or factors is None:
        need(not wanted and factors is None, "The state must hold the optimizer's numbers for rows and columns.")
        return
    need(
        tuple(part.numel() for part in factors) == LedgerPositions(chooser.ledger).shape
        and not any(bool((part < 0).any()) for part in factors),
        "The state's numbers of rows and columns are not those of this model, or below 0.",
    )
