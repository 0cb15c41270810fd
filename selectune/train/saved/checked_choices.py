"""The part of a state that says what was chosen when, held against the schedule: what it can have asked for by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selectune.errors import ConfigError
from selectune.train.choose.chooser import Chooser
from selectune.train.choose.dropping import Dropping
from selectune.train.choose.growing import Afresh, Growing
from selectune.train.engine import Engine
from selectune.train.ledger import LedgerPlaces
from selectune.types import Phased, Reads, Schedule

EVENTS = ("skipped_steps", "broken_windows", "short_windows", "nonfinite_selections", "shortfall", "zero_scores")
_LOST = ("broken_windows", "nonfinite_selections", "shortfall")  # after these fewer are selected than were asked for
_LOOK = 10_000  # steps that are gone back for a selection


def check_choices(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ConfigError where the chooser's part is not one that this run can have come to by the state's step."""
    told, own = info["chooser"], engine.chooser
    expected = own.state().keys() - {"queue"}
    if not expected <= told.keys() <= expected | {"queue"}:
        raise ConfigError(f"The state's \"chooser\" has {sorted(told)}; this method's has {sorted(expected)}.")
    step, ahead = info["step"], told["ahead"]
    if type(ahead) is not int or not -1 <= ahead <= step:
        raise ConfigError(f'The state\'s "chooser" chose last before step {ahead!r}; the state is of step {step}.')
    _number(engine, info, engine.budget - int(tensors["free"].numel()))
    _news(engine, info, tensors)
    _queue(engine, info, tensors)
    if isinstance(own, Dropping):
        _window(own, info, tensors)
        _factors(own, step, told["factors"], tensors)


def named(told: Any, path: str, tensors: Mapping[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that stands for the value at a path: {"tensor": path}; without a dtype one of numbers, none NaN."""
    found = tensors.get(path) if isinstance(told, Mapping) and told == {"tensor": path} else None
    if not isinstance(found, Tensor) or (dtype is not None and (found.dtype != dtype or found.ndim != 1)):
        raise ConfigError(f'The state says {told!r:.80} where its tensor "{path}" belongs, or this is of another kind.')
    if found.is_floating_point() and bool(found.isnan().any()):
        raise ConfigError(f'The state holds NaN in "{path}": the run broke before it was saved. Go on from an earlier.')
    return found


def _number(engine: Engine, info: Mapping[str, Any], selected: int) -> None:
    """As many are selected as the schedule has asked for by the step; fewer where the events say that some were not."""
    step, asked = info["step"], _asked(engine, info["step"], info["chooser"]["ahead"])
    lost = any(info["events"].get(name, 0) for name in _LOST)
    if asked is not None and (selected > asked or (selected < asked and not lost)):
        raise ConfigError(
            f"The state has {selected:,} entries selected at step {step}; by then the schedule has asked for {asked:,}"
            + (", and no selection fell short." if selected < asked else ".")
        )


def _asked(engine: Engine, step: int, ahead: int) -> int | None:
    schedule, own = engine.schedule, engine.chooser
    if schedule is None or isinstance(own, Dropping):
        return engine.budget
    if isinstance(schedule, Phased):
        return schedule.target(step)
    if own.score.reads is not Reads.GRADIENT and ahead == step and schedule.due(step):
        return schedule.target(step)
    return _before(schedule, step)


def _before(schedule: Schedule, step: int) -> int | None:
    """What the last selection before a step asked for; None if it lies too far back."""
    for past in range(step - 1, max(-1, step - 1 - _LOOK), -1):
        if schedule.due(past):
            return schedule.target(past)
    return 0 if step <= _LOOK else None


def _news(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    told, own, step = info["chooser"], engine.chooser, info["step"]
    news, chosen = told["news"], told["ahead"] == step
    due = engine.schedule is not None and engine.schedule.due(step)
    if isinstance(own, Afresh) and own.score.reads is not Reads.GRADIENT and chosen and due and news is None:
        raise ConfigError(f"The state's entries were chosen for step {step}, and which of them are new is not said.")
    if news is None:
        return
    if not isinstance(own, Afresh | Dropping) or (own.score.reads is Reads.GRADIENT and not _has_window(own)):
        raise ConfigError("The state has new entries, and this method has none between steps.")
    if not chosen or not due:
        raise ConfigError(f"The state has new entries, and none were chosen for step {step}.")
    if not isinstance(news, Mapping) or news.keys() != {"slots", "mean", "square", "age"}:
        raise ConfigError('The state\'s new entries must have "slots", "mean", "square" and "age".')
    slots = named(news["slots"], "chooser.news.slots", tensors, torch.int64)
    dtype = engine.ledger.offsets.dtype
    seen = [
        named(news[part], f"chooser.news.{part}", tensors, dtype).shape
        for part in ("mean", "square")
        if news[part] is not None
    ]
    age = news["age"]
    if any(shape != slots.shape for shape in seen) or len(seen) == 1 or type(age) is not int:
        raise ConfigError("The state's new entries have parts that do not fit each other.")
    if not (0 < age <= step if seen else age == 0):
        raise ConfigError(f"The state's new entries were watched for {age} steps, which cannot be at step {step}.")
    if bool((slots < 0).any()) or bool((slots >= engine.budget).any()) or slots.unique().numel() != slots.numel():
        raise ConfigError("The state's new entries name slots that there are not, or one twice.")
    if bool(torch.isin(slots.cpu(), tensors["free"].cpu()).any()):
        raise ConfigError("The state's new entries name slots that no entry has.")


def _has_window(own: Chooser) -> bool:
    return isinstance(own, Dropping) and own.schedule.window > 0


# -- orders known beforehand


def _queue(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    own, told = engine.chooser, info["chooser"].get("queue")
    schedule = engine.schedule if type(own) is Growing else None
    ordered = schedule is not None and own.score.reads not in (Reads.GRADIENT, Reads.CHANGE)
    selected = engine.budget - int(tensors["free"].numel())
    if told is None:
        if ordered and selected:
            raise ConfigError("The state has no queue of entries to select, and some of it are selected.")
        return
    if schedule is None or not ordered or not isinstance(own, Growing):
        raise ConfigError("The state has a queue of entries to select, and this method has none.")
    if not isinstance(told, Sequence) or len(told) != 2:
        raise ConfigError("The state's queue of entries to select must be two vectors: tensors and indices.")
    which, flat = (named(part, f"chooser.queue.{k}", tensors, torch.int64).cpu() for k, part in enumerate(told))
    sizes = torch.tensor([t.parameter.numel() for t in engine.ledger.tensors])
    fits = which.shape == flat.shape and not bool(((which < 0) | (which >= len(sizes))).any())
    if not fits or bool(((flat < 0) | (flat >= sizes[which])).any()):
        raise ConfigError("The state's queue of entries to select names entries that there are not.")
    begins = torch.cumsum(sizes, 0) - sizes
    mine = [tensors[f"page.{t.index}.flat"].cpu() + begins[t.index] for t in engine.ledger.tensors]
    entries = torch.cat([begins[which] + flat, *mine])
    if torch.unique(entries).numel() != entries.numel():
        raise ConfigError("The state's queue of entries to select names one twice, or one that is selected.")
    left, lost = engine.budget - selected, info["events"].get("nonfinite_selections", 0)
    if flat.numel() > left or (flat.numel() < left and not lost):
        raise ConfigError(f"The state's queue has {flat.numel():,} entries to select; {left:,} of the budget are left.")
    before = _before(schedule, info["step"]) if info["chooser"]["ahead"] == info["step"] else None
    if before is not None and bool(tensors["offsets"][before:selected].any()):
        raise ConfigError(f"The state's entries of step {info['step']} are trained already, before that step.")
    _order(engine, own, which, flat)


def _order(engine: Engine, own: Growing, which: Tensor, flat: Tensor) -> None:
    """An order by weights or by draws is the same in every process on a CPU, and is made again here."""
    if own.score.reads not in (Reads.WEIGHT, Reads.NOTHING) or engine.ledger.offsets.device.type != "cpu":
        return
    known = own.expected()
    if known is None:
        return
    for theirs, mine in zip((which, flat), known, strict=True):
        count = min(theirs.numel(), mine.numel())
        if not torch.equal(theirs[theirs.numel() - count :], mine.cpu()[mine.numel() - count :]):
            raise ConfigError("The state's queue of entries to select is not in the order that the weights give.")


# -- exchanges


def _window(own: Dropping, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    window, step, schedule = info["chooser"]["window"], info["step"], own.schedule
    if not isinstance(window, Mapping) or window.keys() != {"steps", "watched", "sum", "square"}:
        raise ConfigError('The state\'s window must have "steps", "watched", "sum" and "square".')
    steps = window["steps"]
    if type(steps) is not int or not 0 <= steps <= step or not all(isinstance(window[p], Mapping) for p in _PARTS):
        raise ConfigError(f"The state's window has been open for {steps!r} steps, which cannot be at step {step}.")
    parts = [window[part].keys() for part in _PARTS]
    if any(keys != parts[0] for keys in parts) or (steps == 0 and parts[0]):
        raise ConfigError("The state's watched entries and their gradients are not of the same tensors.")
    if steps == 0:
        return
    due = any(schedule.due(past) for past in range(step - steps + 1, step))
    used = info["chooser"]["ahead"] == step and schedule.due(step)
    if not _has_window(own) or own.score.reads is not Reads.GRADIENT or not schedule.opens(step - steps) or due or used:
        raise ConfigError(f"The state's window has been open for {steps} steps, which the schedule has not at {step}.")
    sizes = {str(tensor.index): tensor.parameter.numel() for tensor in own.tensors}
    for index in window["watched"]:
        if index not in sizes:
            raise ConfigError(f"The state's watched entries are of tensor {index!r:.40}, which is not in scope.")
        flat = named(window["watched"][index], f"chooser.window.watched.{index}", tensors, torch.int64)
        if not bool((flat[1:] > flat[:-1]).all()):
            raise ConfigError("The state's watched entries do not ascend, or one stands there twice.")
        if flat.numel() and not (0 <= int(flat[0]) and int(flat[-1]) < sizes[index]):
            raise ConfigError("The state's watched entries leave their tensor.")
        for part in ("sum", "square"):
            told = named(window[part][index], f"chooser.window.{part}.{index}", tensors, own.ledger.offsets.dtype)
            if told.shape != flat.shape:
                raise ConfigError("The state's watched entries and their gradients differ in number.")


_PARTS = ("watched", "sum", "square")


def _factors(own: Dropping, step: int, told: Any, tensors: Mapping[str, Tensor]) -> None:
    wanted = own.score.reads is Reads.FACTORS and step > 0
    if told is None and not wanted:
        return
    if not wanted or not isinstance(told, Sequence) or len(told) != 2:
        raise ConfigError("The state must say what an optimizer holds for rows and columns where the score reads it.")
    dtype = own.ledger.offsets.dtype
    factors = [named(part, f"chooser.factors.{k}", tensors, dtype) for k, part in enumerate(told)]
    if tuple(part.numel() for part in factors) != LedgerPlaces(own.ledger).shape or any(
        bool((f < 0).any()) for f in factors
    ):
        raise ConfigError("The state's numbers of rows and columns are not those of this model, or below 0.")
