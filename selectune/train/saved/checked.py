"""Checks all of a state before anything is written: it is one of this run, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selectune import bits, ops
from selectune.delta import inventory
from selectune.delta.file.fingerprint import never_loaded
from selectune.errors import BaseMismatchError, ConfigError, SelectuneError, some
from selectune.scope import ScopedTensor
from selectune.train.engine import Engine
from selectune.train.saved.checked_choices import EVENTS, check_choices
from selectune.train.saved.forms import ascends, fits, need, unpacked
from selectune.train.support.ledger import Ledger

VERSION = 3
_INFO = {"version", "run", "step", "reached", "restarted", "events", "chooser", "phase"}
GUESTS = "trainer."
"""How keys begin that an integration keeps in a state's file, beside the tuner's own: the order of the data."""
PAGE = ("flat", "slot", "base", "retired", "retired_base")
"""The parts of a tensor's page that a state holds."""


def checked(
    engine: Engine, state: Mapping[str, Any], mine: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state's two halves, with the tensors of chooser and phase in their places; nothing is changed.

    `mine`: what must be the same in both runs. Raises ConfigError for a state of another run or one whose parts do not
    fit each other, and BaseMismatchError for one that was taken on another base.
    """
    if not isinstance(state, Mapping) or set(state) != {"info", "tensors"} or not isinstance(state["info"], Mapping):
        raise ConfigError('A state has the keys "info" and "tensors", as Tuner.state_dict gives them.')
    info, tensors = dict(state["info"]), state["tensors"]
    if type(info.get("version")) is not int or info["version"] != VERSION:
        raise ConfigError(f"The state has version {info.get('version')!r}; this selectune reads version {VERSION}.")
    if info.keys() != _INFO or not isinstance(tensors, Mapping):
        raise ConfigError(f'The state\'s "info" must hold {", ".join(sorted(_INFO))}; it has {sorted(info)!r:.200}.')
    tensors = dict(tensors)
    try:
        _check(engine, info, tensors, mine)
    except SelectuneError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ConfigError(f"The state is not put together as Tuner.state_dict does it: {error!r:.200}.") from error
    return info, tensors


def _check(engine: Engine, info: dict[str, Any], tensors: Mapping[str, Tensor], mine: Mapping[str, Any]) -> None:
    _same_run(engine, json.loads(json.dumps(mine)), info["run"])
    _plain_values(engine, info)
    expected = _expected(engine)
    for key, form in expected.items():
        _present(key, tensors.get(key), form)
    for tensor in engine.ledger.tensors:
        _page(tensor, tensors)
    _slots(engine, tensors)
    _finite(engine, tensors)
    _bases(engine, tensors)
    _starts(engine, info, tensors)
    used: set[str] = set()
    for part in ("chooser", "phase"):
        info[part] = unpacked(info[part], part, tensors, used)
    check_choices(engine, info, tensors)
    _phase(engine, info)
    strange = sorted(ascii(key)[:60] for key in tensors.keys() - expected - used if not str(key).startswith(GUESTS))
    need(not strange, f"The state holds tensors that this run has no place for: {some(strange)}.")


def _same_run(engine: Engine, mine: Mapping[str, Any], theirs: Any) -> None:
    if not isinstance(theirs, Mapping) or theirs.keys() != mine.keys() or not isinstance(theirs["base"], Mapping):
        raise ConfigError('The state\'s "run" does not say which run it is of, as Tuner.state_dict does.')
    for key in ("method", "seed", "accumulation_steps", "budget"):
        if mine[key] != theirs[key]:
            raise ConfigError(f"The state is of another run: its {key} is {theirs[key]}, this tuner's is {mine[key]}.")
    names = mine["base"].keys() | theirs["base"].keys()
    moved = sorted(name for name in names if mine["base"].get(name) != theirs["base"].get(name))
    if moved:
        fresh = set(moved) <= set(never_loaded(inventory(engine.model)))
        raise BaseMismatchError(
            f"The state was taken on another base: {len(moved)} tensors differ ({some(moved)}). "
            + (
                "No checkpoint holds them, so they were drawn at random: before the model is made, set the seed that "
                "the run began with (transformers.set_seed)."
                if fresh
                else "Attach to the base model that the run began with, then load the state."
            )
        )


def _plain_values(engine: Engine, info: Mapping[str, Any]) -> None:
    reached, events, known = info["reached"], info["events"], len(engine.ledger.tensors)
    need(_count(info["step"]), f"The state's step is {info['step']!r}; it must be a whole number of at least 0.")
    need(
        type(reached) is list
        and all(type(index) is int and 0 <= index < known for index in reached)
        and reached == sorted(set(reached)),
        f'The state\'s "reached" must be an ascending list of numbers of its {known} tensors in scope, once each.',
    )
    need(
        isinstance(events, Mapping) and all(key in EVENTS and _count(value) for key, value in events.items()),
        f'The state\'s "events" must be how often something happened, of {", ".join(EVENTS)}.',
    )
    need(isinstance(info["chooser"], Mapping), 'The state\'s "chooser" must be a mapping.')
    need(
        type(info["restarted"]) is bool,
        'The state\'s "restarted" must say whether a slot starts from another weight than the base.',
    )


def _expected(engine: Engine) -> dict[str, Any]:
    """The form of every tensor that any state of this run holds."""
    offsets, index = engine.ledger.offsets, torch.int64
    expected: dict[str, Any] = {"offsets": offsets, "start": offsets, "free": index}
    for tensor in engine.ledger.tensors:
        weight = tensor.form.dtype
        for part, form in zip((*PAGE, "retired_now"), (index, index, weight, index, weight, weight), strict=True):
            expected[f"page.{tensor.index}.{part}"] = form
    expected |= {f"whole.{t.name}": t.parameter for t in engine.found.whole}
    return expected | {f"buffer.{n}": b for n, b in engine.model.named_buffers() if n in engine.base.buffers}


def _present(key: str, tensor: Any, form: Any) -> None:
    if not fits(tensor, form):
        has = f"shape {tuple(tensor.shape)}, dtype {tensor.dtype}" if isinstance(tensor, Tensor) else "none"
        must = f"shape {tuple(form.shape)}, dtype {form.dtype}" if isinstance(form, Tensor) else f"a vector of {form}"
        raise ConfigError(f'The state\'s tensor "{key}" is missing or has another shape: it has {has}; needed: {must}.')


def _page(tensor: ScopedTensor, tensors: Mapping[str, Tensor]) -> None:
    flat, slot, base, retired, retired_base = (tensors[f"page.{tensor.index}.{part}"] for part in PAGE)
    now, size = tensors[f"page.{tensor.index}.retired_now"], tensor.form.numel()
    for where in (flat, retired):
        inside = not where.numel() or (int(where.min()) >= 0 and int(where.max()) < size)
        need(inside, f'The state\'s indices of "{tensor.name}" leave the tensor.')
        need(ascends(where, size), f'The state\'s indices of "{tensor.name}" do not ascend, or one stands there twice.')
    need(
        flat.shape == slot.shape == base.shape and retired.shape == retired_base.shape == now.shape,
        f'The state\'s page of "{tensor.name}" has parts of different lengths.',
    )
    need(
        not bool(torch.isin(flat, retired).any()),
        f'The state says of "{tensor.name}" that the same entries are selected and dropped.',
    )


def _slots(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    """Every slot is used by one entry or free."""
    used = [tensors[f"page.{tensor.index}.slot"].cpu() for tensor in engine.ledger.tensors]
    free, capacity = tensors["free"].cpu(), engine.ledger.offsets.numel()
    slots = torch.sort(torch.cat([*used, free])).values
    need(
        torch.equal(slots, torch.arange(capacity)) and ascends(free, capacity),
        f"The state's slots are not those of a budget of {capacity:,}: each must be used by one entry or be free, "
        "and the free ones must ascend.",
    )


def _finite(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    keys = ["offsets", "start", *(f"page.{tensor.index}.retired_now" for tensor in engine.ledger.tensors)]
    broken = [key for key in keys if not bool(torch.isfinite(tensors[key]).all())]
    broken += [f"whole.{t.name}" for t in engine.found.whole if bool(tensors[f"whole.{t.name}"].isnan().any())]
    if broken:
        raise ConfigError(
            f'The state holds NaN or infinity among its trained values ("{broken[0]}"): the run broke before it was '
            "saved. Go on from an earlier one."
        )


def starts_elsewhere(ledger: Ledger, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a slot starts from another weight than its entry's base: chosen again, or loaded from elsewhere."""
    start = tensors["start"]
    for tensor in ledger.tensors:
        slot, base = (tensors[f"page.{tensor.index}.{part}"] for part in ("slot", "base"))
        if not bits.same_bits(start[slot].cpu(), base.to(start.dtype).cpu()):
            return True
    return False


def _starts(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if not info["restarted"] and starts_elsewhere(engine.ledger, tensors):
        raise ConfigError("The state says that every slot starts from its entry's base, and one does not.")
    dropped = [t.name for t in engine.ledger.tensors if tensors[f"page.{t.index}.retired"].numel()]
    if dropped and (engine.schedule is None or engine.schedule.keeps):
        raise ConfigError(f'The state has entries of "{dropped[0]}" dropped with their values; this method drops none.')


def _bases(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    """The state's base values are those of this model."""
    moved = []
    for tensor in engine.ledger.tensors:
        flat, _, base, retired, retired_base = (tensors[f"page.{tensor.index}.{part}"] for part in PAGE)
        where, theirs = torch.cat((flat, retired)), torch.cat((base, retired_base))
        mine = _base_at(engine, tensor, where.to(tensor.form.device)).to(theirs.device)
        if not bits.same_bits(mine, theirs):
            moved.append(tensor.name)
    if moved:
        raise BaseMismatchError(
            f"The state's base values of {len(moved)} tensors ({some(moved)}) are not those of this model: it "
            "was taken on another base, or was changed. Attach to the base model that the run began with."
        )


def _base_at(engine: Engine, tensor: ScopedTensor, flat: Tensor) -> Tensor:
    """The base values of entries, wherever they are kept now."""
    if tensor.name in engine.base.whole:
        return ops.gather_entries(engine.base.held(tensor), flat)
    values = engine.ledger.store.read(tensor.index, flat)
    touched, base = engine.ledger.pages[tensor.index].touched()
    if touched.numel():
        at = torch.searchsorted(touched, flat).clamp_(max=touched.numel() - 1)
        values = torch.where(touched[at] == flat, base[at], values)
    return values


def _phase(engine: Engine, info: Mapping[str, Any]) -> None:
    phase, mine, step = info["phase"], engine.phase, info["step"]
    if (mine is None) != (phase is None):
        raise ConfigError("The state is of a method with a dense phase, or without one; this tuner's is the other.")
    if mine is None:
        return
    need(fits(phase, {"on": bool, "latents": list, "before": list}), 'The state\'s "phase" does not say if it is on.')
    dense = mine.phased is None or mine.phased.dense(step)
    waits = mine.phased is not None and step > 0 and not mine.phased.dense(step - 1)  # until the next forward
    if phase["on"] != dense and not (dense and waits):
        raise ConfigError(f"The state's dense phase is {'on' if phase['on'] else 'off'} at step {step}; it cannot be.")
    heads = [] if mine.kind.found or not phase["on"] else [t.parameter for t in engine.found.whole]
    latents = _latents(engine) if phase["on"] else []
    need(
        fits(phase, {"on": bool, "latents": latents, "before": heads}),
        "The saved dense phase is that of another model or method: its tensors are others, or have other shapes.",
    )


def _latents(engine: Engine) -> list[list[Tensor]]:
    """Tensors of the shapes and dtypes that a dense phase trains; at most one weight's memory is used at a time."""
    phase = engine.phase
    if phase is None:
        return []
    if phase.dense:
        return [[latent.detach() for latent in group] for group in phase.latents]
    forms = []
    for tensor, latents in zip(phase.tensors, phase.latents, strict=True):
        weight = tensor.weight
        if latents[0] is tensor.parameter:
            forms.append([weight])
            continue
        start = phase.kind.start(weight.to(bits.wide(weight.dtype), copy=True))
        forms.append([part.to("meta") for part in start])
    return forms


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
