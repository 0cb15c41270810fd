"""A state that is about to be loaded, looked at whole before anything is written: of this run, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selectune import bits, ops
from selectune.delta import inventory
from selectune.delta.file.fingerprint import never_loaded
from selectune.errors import BaseMismatchError, ConfigError, SelectuneError
from selectune.scope import ScopedTensor
from selectune.train.engine import Engine
from selectune.train.ledger import Ledger
from selectune.train.saved.checked_choices import EVENTS, check_choices, named

VERSION = 3
_INFO = {"version", "run", "step", "reached", "restarted", "events", "chooser", "phase"}
GUESTS = "trainer."
"""How keys begin of what an integration keeps in a state's file, beside the tuner's own: the order of the data."""
PAGE = ("flat", "slot", "base", "retired", "retired_base")
"""The parts of a tensor's page that a state holds."""


def checked(
    engine: Engine, state: Mapping[str, Any], mine: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state's two halves, if it is one of this run; nothing is changed.

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
        _look(engine, info, tensors, mine)
    except SelectuneError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ConfigError(f"The state is not put together as Tuner.state_dict does it: {error!r:.200}.") from error
    return info, tensors


def _look(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor], mine: Mapping[str, Any]) -> None:
    _of_this_run(engine, json.loads(json.dumps(mine)), info.get("run"))
    _numbers(engine, info)
    _present(engine, tensors)
    for tensor in engine.ledger.tensors:
        _page(tensor, tensors)
    _slots(engine, tensors)
    _finite(engine, tensors)
    _bases(engine, tensors)
    _starts(engine, info, tensors)
    check_choices(engine, info, tensors)
    _phase(engine, info, tensors)
    known = _expected(engine).keys() | _references(info["chooser"]) | _references(info["phase"])
    strange = sorted(ascii(key)[:60] for key in tensors.keys() - known if not str(key).startswith(GUESTS))
    if strange:
        raise ConfigError(f"The state holds tensors that this run has no place for: {', '.join(strange[:3])}.")


def _of_this_run(engine: Engine, mine: Mapping[str, Any], theirs: Any) -> None:
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
            f"The state was taken on another base: {len(moved)} tensors differ ({', '.join(moved[:5])}). "
            + (
                "No checkpoint holds them, so they were drawn at random: before the model is made, set the seed that "
                "the run began with (transformers.set_seed)."
                if fresh
                else "Attach to the base model that the run began with, then load the state."
            )
        )


def _numbers(engine: Engine, info: Mapping[str, Any]) -> None:
    if not _count(info.get("step")):
        raise ConfigError(f"The state's step is {info.get('step')!r}; it must be a whole number of at least 0.")
    reached, events = info.get("reached"), info.get("events")
    known = range(len(engine.ledger.tensors))
    if not isinstance(reached, list) or not all(_count(index) and index in known for index in reached):
        raise ConfigError(f'The state\'s "reached" must be a list of numbers of its {len(known)} tensors in scope.')
    if reached != sorted(set(reached)):
        raise ConfigError('The state\'s "reached" must name tensors once each, in ascending order.')
    if not isinstance(events, Mapping) or not all(k in EVENTS and _count(v) for k, v in events.items()):
        raise ConfigError(f'The state\'s "events" must be how often something happened, of {", ".join(EVENTS)}.')
    if not isinstance(info["chooser"], Mapping):
        raise ConfigError('The state\'s "chooser" must be a mapping.')
    if type(info["restarted"]) is not bool:
        raise ConfigError('The state\'s "restarted" must say whether a slot starts from another weight than the base.')


def _references(told: Any) -> set[str]:
    """Keys of the tensors that plain values stand for."""
    if isinstance(told, Mapping):
        own = {str(told["tensor"])} if told.keys() == {"tensor"} else set()
        return own.union(*map(_references, told.values()))
    return set().union(*map(_references, told)) if isinstance(told, list) else set()


def _expected(engine: Engine) -> dict[str, tuple[torch.dtype, torch.Size | None]]:
    """Every tensor that a state has whatever was chosen: dtype and shape, None for a vector of any length."""
    offsets = engine.ledger.offsets
    expected: dict[str, tuple[torch.dtype, torch.Size | None]] = {
        "offsets": (offsets.dtype, offsets.shape),
        "start": (offsets.dtype, offsets.shape),
        "free": (torch.int64, None),
    }
    for tensor in engine.ledger.tensors:
        own = tensor.parameter.dtype
        for part in (*PAGE, "retired_now"):
            whole = part in ("flat", "slot", "retired")
            expected[f"page.{tensor.index}.{part}"] = (torch.int64 if whole else own, None)
    expected |= {f"whole.{t.name}": (t.parameter.dtype, t.parameter.shape) for t in engine.found.whole}
    buffers = {n: b for n, b in engine.model.named_buffers() if n in engine.base.buffers}
    expected |= {f"buffer.{name}": (buffer.dtype, buffer.shape) for name, buffer in buffers.items()}
    return expected


def _present(engine: Engine, tensors: Mapping[str, Any]) -> None:
    """Every tensor that will be read is there, in its shape and dtype."""
    for key, (dtype, shape) in _expected(engine).items():
        found = tensors.get(key)
        if not isinstance(found, Tensor) or (shape is not None and found.shape != shape):
            raise ConfigError(f'The state\'s tensor "{key}" is missing or has another shape.')
        if found.dtype != dtype or (shape is None and found.ndim != 1):
            raise ConfigError(
                f'The state\'s tensor "{key}" has dtype {found.dtype} and {found.ndim} dimensions; it must be {dtype}'
                + (" with one." if shape is None else ".")
            )


def _page(tensor: ScopedTensor, tensors: Mapping[str, Tensor]) -> None:
    flat, slot, base, retired, retired_base = (tensors[f"page.{tensor.index}.{part}"] for part in PAGE)
    now = tensors[f"page.{tensor.index}.retired_now"]
    for where in (flat, retired):
        if where.numel() and not (0 <= int(where.min()) and int(where.max()) < tensor.parameter.numel()):
            raise ConfigError(f'The state\'s indices of "{tensor.name}" leave the tensor.')
        if not _ascends(where):
            raise ConfigError(f'The state\'s indices of "{tensor.name}" do not ascend, or one stands there twice.')
    if flat.shape != slot.shape or flat.shape != base.shape or not retired.shape == retired_base.shape == now.shape:
        raise ConfigError(f'The state\'s page of "{tensor.name}" has parts of different lengths.')
    if bool(torch.isin(flat, retired).any()):
        raise ConfigError(f'The state says of "{tensor.name}" that the same entries are selected and dropped.')


def _slots(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    """Every slot is used by one entry or free."""
    used = [tensors[f"page.{tensor.index}.slot"].cpu() for tensor in engine.ledger.tensors]
    free, capacity = tensors["free"].cpu(), engine.ledger.offsets.numel()
    slots = torch.sort(torch.cat([*used, free])).values
    if not torch.equal(slots, torch.arange(capacity)) or not _ascends(free):
        raise ConfigError(
            f"The state's slots are not those of a budget of {capacity:,}: each must be used by one entry or be free, "
            "and the free ones must ascend."
        )


def _finite(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    keys = ["offsets", "start"]
    for tensor in engine.ledger.tensors:
        keys.append(f"page.{tensor.index}.retired_now")
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
        if not torch.equal(ops.bits(start[slot].cpu()), ops.bits(base.to(start.dtype).cpu())):
            return True
    return False


def _starts(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if not info["restarted"] and starts_elsewhere(engine.ledger, tensors):
        raise ConfigError("The state says that every slot starts from its entry's base, and one does not.")
    keeps = engine.schedule is None or engine.schedule.keeps
    dropped = [t.name for t in engine.ledger.tensors if tensors[f"page.{t.index}.retired"].numel()]
    if keeps and dropped:
        raise ConfigError(f'The state has entries of "{dropped[0]}" dropped with their values; this method drops none.')


def _bases(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    """What the state says stood under its entries is what stands under them here."""
    moved = []
    for tensor in engine.ledger.tensors:
        flat, _, base, retired, retired_base = (tensors[f"page.{tensor.index}.{part}"] for part in PAGE)
        where, theirs = torch.cat((flat, retired)), torch.cat((base, retired_base))
        here = _base_at(engine, tensor, where.to(tensor.parameter.device)).to(theirs.device)
        if not torch.equal(ops.bits(here), ops.bits(theirs)):
            moved.append(tensor.name)
    if moved:
        raise BaseMismatchError(
            f"The state's base values of {len(moved)} tensors ({', '.join(moved[:5])}) are not those of this model: it "
            "was taken on another base, or was changed. Attach to the base model that the run began with."
        )


def _base_at(engine: Engine, tensor: ScopedTensor, flat: Tensor) -> Tensor:
    """The base values of entries, wherever they are kept now."""
    if tensor.name in engine.base.whole:
        return ops.gather_entries(engine.base.held(tensor), flat)
    found = ops.gather_entries(tensor.parameter.detach(), flat)
    known, base = engine.ledger.pages[tensor.index].touched()
    if known.numel():
        at = torch.searchsorted(known, flat).clamp_(max=known.numel() - 1)
        found = torch.where(known[at] == flat, base[at], found)
    return found


def _phase(engine: Engine, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    phase, mine, step = info["phase"], engine.phase, info["step"]
    if (mine is None) != (phase is None):
        raise ConfigError("The state is of a method with a dense phase, or without one; this tuner's is the other.")
    if mine is None:
        return
    if not isinstance(phase, Mapping) or phase.keys() != {"on", "latents", "before"} or type(phase["on"]) is not bool:
        raise ConfigError('The state\'s "phase" does not say whether it is on.')
    dense = mine.phased is None or mine.phased.dense(step)
    waits = mine.phased is not None and step > 0 and not mine.phased.dense(step - 1)  # until the next forward
    if phase["on"] != dense and not (dense and waits):
        raise ConfigError(f"The state's dense phase is {'on' if phase['on'] else 'off'} at step {step}; it cannot be.")
    heads = [] if mine.kind.found or not phase["on"] else [t.parameter for t in engine.found.whole]
    latents = _latents(engine) if phase["on"] else []
    told = [group if isinstance(group, list) else [group, None] for group in phase["latents"]]
    if [len(group) for group in told] != [len(group) for group in latents] or len(phase["before"]) != len(heads):
        raise ConfigError("The saved dense phase is that of another model or method: it has other tensors.")
    pairs = [
        (named(value, f"phase.latents.{i}.{j}", tensors), latents[i][j])
        for i, group in enumerate(told)
        for j, value in enumerate(group)
    ]
    pairs += [(named(value, f"phase.before.{i}", tensors), heads[i]) for i, value in enumerate(phase["before"])]
    if any(found.shape != like.shape or found.dtype != like.dtype for found, like in pairs):
        raise ConfigError("The saved dense phase is that of another model or method: its tensors have other shapes.")


def _latents(engine: Engine) -> list[list[Tensor]]:
    """Tensors of the shapes and dtypes that a dense phase trains, of one weight's memory at a time."""
    phase = engine.phase
    if phase is None:
        return []
    if phase.dense:
        return [[latent.detach() for latent in group] for group in phase.latents]
    found = []
    for tensor, latents in zip(phase.tensors, phase.latents, strict=True):
        weight = tensor.parameter.detach()
        if latents[0] is tensor.parameter:
            found.append([weight])
            continue
        wide = bits.wide(weight.dtype)
        found.append([part.to("meta") for part in phase.kind.start(weight.to(wide, copy=True))])
    return found


def _ascends(indices: Tensor) -> bool:
    return bool((indices[1:] > indices[:-1]).all())


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
