"""A state that is about to be loaded, looked at whole before anything is written: of this run, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectune import ops
from selectune.errors import BaseMismatchError, ConfigError, SelectuneError
from selectune.scope import ScopedTensor

if TYPE_CHECKING:
    from selectune.train.attach import Tuner

VERSION = 2
PAGE = ("flat", "slot", "base", "retired", "retired_base")
"""The parts of a tensor's page that a state holds."""


def checked(
    tuner: Tuner, state: Mapping[str, Any], mine: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state's two halves, if it is one of this run; nothing is changed.

    `mine`: what must be the same in both runs. Raises ConfigError for a state of another run or one whose parts do not
    fit each other, and BaseMismatchError for one that was taken on another base.
    """
    if not isinstance(state, Mapping) or set(state) != {"info", "tensors"} or not isinstance(state["info"], Mapping):
        raise ConfigError('A state has the keys "info" and "tensors", as Tuner.state_dict gives them.')
    info, tensors = dict(state["info"]), dict(state["tensors"])
    if info.get("version") != VERSION:
        raise ConfigError(f"The state has version {info.get('version')!r}; this selectune reads version {VERSION}.")
    try:
        _look(tuner, info, tensors, mine)
    except SelectuneError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"The state is not put together as Tuner.state_dict does it: {error!r}.") from error
    return info, tensors


def _look(tuner: Tuner, info: Mapping[str, Any], tensors: Mapping[str, Tensor], mine: Mapping[str, Any]) -> None:
    _of_this_run(json.loads(json.dumps(mine)), info.get("run"))
    _numbers(tuner, info)
    _present(tuner, tensors)
    for tensor in tuner._ledger.tensors:
        _page(tensor, tensors)
    _slots(tuner, tensors)
    _finite(tuner, tensors)
    _bases(tuner, tensors)
    _choices(tuner, info["chooser"], tensors)
    _phase(tuner, info["phase"], tensors)


def _of_this_run(mine: Mapping[str, Any], theirs: Any) -> None:
    if not isinstance(theirs, Mapping) or theirs.keys() != mine.keys() or not isinstance(theirs["base"], Mapping):
        raise ConfigError('The state\'s "run" does not say which run it is of, as Tuner.state_dict does.')
    for key in ("method", "seed", "accumulation_steps", "budget"):
        if mine[key] != theirs[key]:
            raise ConfigError(f"The state is of another run: its {key} is {theirs[key]}, this tuner's is {mine[key]}.")
    names = mine["base"].keys() | theirs["base"].keys()
    moved = sorted(name for name in names if mine["base"].get(name) != theirs["base"].get(name))
    if moved:
        raise BaseMismatchError(
            f"The state was taken on another base: {len(moved)} tensors differ ({', '.join(moved[:5])}). Attach to the "
            "base model that the run began with, then load the state."
        )


def _numbers(tuner: Tuner, info: Mapping[str, Any]) -> None:
    if not _count(info.get("step")):
        raise ConfigError(f"The state's step is {info.get('step')!r}; it must be a whole number of at least 0.")
    reached, events = info.get("reached"), info.get("events")
    known = range(len(tuner._ledger.tensors))
    if not isinstance(reached, list) or not all(_count(index) and index in known for index in reached):
        raise ConfigError(f'The state\'s "reached" must be a list of numbers of its {len(known)} tensors in scope.')
    if not isinstance(events, Mapping) or not all(isinstance(k, str) and _count(v) for k, v in events.items()):
        raise ConfigError('The state\'s "events" must be a mapping of names to how often they happened.')
    if not isinstance(info.get("chooser"), Mapping) or "phase" not in info:
        raise ConfigError('The state lacks its "chooser" or "phase".')


def _present(tuner: Tuner, tensors: Mapping[str, Any]) -> None:
    """Every tensor that will be read is there, in its shape and dtype."""
    offsets = tuner._ledger.offsets
    expected: dict[str, tuple[torch.dtype, torch.Size | None]] = {
        "offsets": (offsets.dtype, offsets.shape),
        "start": (offsets.dtype, offsets.shape),
        "free": (torch.int64, None),
    }
    for tensor in tuner._ledger.tensors:
        own = tensor.parameter.dtype
        for part in (*PAGE, "retired_now"):
            whole = part in ("flat", "slot", "retired")
            expected[f"page.{tensor.index}.{part}"] = (torch.int64 if whole else own, None)
    expected |= {f"whole.{t.name}": (t.parameter.dtype, t.parameter.shape) for t in tuner._all.dense}
    buffers = {n: b for n, b in tuner.model.named_buffers() if n in tuner._base.buffers}
    expected |= {f"buffer.{name}": (buffer.dtype, buffer.shape) for name, buffer in buffers.items()}
    for key, (dtype, shape) in expected.items():
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


def _slots(tuner: Tuner, tensors: Mapping[str, Tensor]) -> None:
    """Every slot is used by one entry or free."""
    used = [tensors[f"page.{tensor.index}.slot"].cpu() for tensor in tuner._ledger.tensors]
    free, capacity = tensors["free"].cpu(), tuner._ledger.offsets.numel()
    slots = torch.sort(torch.cat([*used, free])).values
    if not torch.equal(slots, torch.arange(capacity)) or not _ascends(free):
        raise ConfigError(
            f"The state's slots are not those of a budget of {capacity:,}: each must be used by one entry or be free, "
            "and the free ones must ascend."
        )


def _finite(tuner: Tuner, tensors: Mapping[str, Tensor]) -> None:
    keys = ["offsets", "start"]
    for tensor in tuner._ledger.tensors:
        keys.append(f"page.{tensor.index}.retired_now")
    broken = [key for key in keys if not bool(torch.isfinite(tensors[key]).all())]
    broken += [f"whole.{t.name}" for t in tuner._all.dense if bool(tensors[f"whole.{t.name}"].isnan().any())]
    if broken:
        raise ConfigError(
            f'The state holds NaN or infinity among its trained values ("{broken[0]}"): the run broke before it was '
            "saved. Go on from an earlier one."
        )


def _bases(tuner: Tuner, tensors: Mapping[str, Tensor]) -> None:
    """What the state says stood under its entries is what stands under them here."""
    moved = []
    for tensor in tuner._ledger.tensors:
        flat, _, base, retired, retired_base = (tensors[f"page.{tensor.index}.{part}"] for part in PAGE)
        where, theirs = torch.cat((flat, retired)), torch.cat((base, retired_base))
        here = _base_at(tuner, tensor, where.to(tensor.parameter.device)).to(theirs.device)
        if not torch.equal(ops.bits(here), ops.bits(theirs)):
            moved.append(tensor.name)
    if moved:
        raise BaseMismatchError(
            f"The state's base values of {len(moved)} tensors ({', '.join(moved[:5])}) are not those of this model: it "
            "was taken on another base, or was changed. Attach to the base model that the run began with."
        )


def _base_at(tuner: Tuner, tensor: ScopedTensor, flat: Tensor) -> Tensor:
    """The base values of entries, wherever they are kept now."""
    if tensor.name in tuner._base.dense:
        return ops.gather_entries(tuner._base.held(tensor), flat)
    found = ops.gather_entries(tensor.parameter.detach(), flat)
    known, base = tuner._ledger.pages[tensor.index].touched()
    if known.numel():
        at = torch.searchsorted(known, flat).clamp_(max=known.numel() - 1)
        found = torch.where(known[at] == flat, base[at], found)
    return found


def _choices(tuner: Tuner, chooser: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The chooser's part names the same things as this tuner's, and entries and slots that there are."""
    expected, sizes = tuner._tracker.chooser.state(), [t.parameter.numel() for t in tuner._ledger.tensors]
    if not {*expected} <= {*chooser, "queue"} or not {*chooser} <= {*expected, "queue"}:
        raise ConfigError(f"The state's \"chooser\" has {sorted(chooser)}; this method's has {sorted(expected)}.")
    if isinstance(chooser["ahead"], bool) or not isinstance(chooser["ahead"], int):
        raise ConfigError(f'The state\'s "chooser" chose last before step {chooser["ahead"]!r}, which is no number.')
    queue = chooser.get("queue")
    if queue is not None:
        which, flat = (_named(part, tensors, torch.int64) for part in queue)
        fits = which.shape == flat.shape and all(0 <= int(index) < len(sizes) for index in torch.unique(which))
        if not fits or bool((flat < 0).any()) or bool((flat >= torch.tensor(sizes)[which.cpu()].to(flat.device)).any()):
            raise ConfigError("The state's queue of entries to select names entries that there are not.")
    if chooser["news"] is not None:
        _news(chooser["news"], tuner._ledger.offsets.numel(), tensors)
    if "window" in chooser:
        _window(chooser["window"], sizes, tensors)
        if chooser["factors"] is not None:
            rows, columns = (_named(part, tensors) for part in chooser["factors"])
            if rows.ndim != 1 or columns.ndim != 1:
                raise ConfigError("The state's numbers of rows and columns are not two vectors.")


def _news(news: Mapping[str, Any], capacity: int, tensors: Mapping[str, Tensor]) -> None:
    slots = _named(news["slots"], tensors, torch.int64)
    seen = [_named(news[part], tensors).shape for part in ("mean", "square") if news[part] is not None]
    if (
        set(news) != {"slots", "mean", "square", "age"}
        or not _count(news["age"])
        or any(s != slots.shape for s in seen)
    ):
        raise ConfigError("The state's new entries have parts that do not fit each other.")
    if slots.numel() and not (0 <= int(slots.min()) and int(slots.max()) < capacity):
        raise ConfigError("The state's new entries name slots that there are not.")


def _window(window: Mapping[str, Any], sizes: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    if not _count(window["steps"]):
        raise ConfigError(f"The state's window has been open for {window['steps']!r} steps, which is no number.")
    for index, told in window["watched"].items():
        flat = _named(told, tensors, torch.int64)
        if not index.isdigit() or int(index) >= len(sizes) or not _ascends(flat):
            raise ConfigError("The state's watched entries are not those of a tensor, in ascending order.")
        if flat.numel() and not (0 <= int(flat[0]) and int(flat[-1]) < sizes[int(index)]):
            raise ConfigError("The state's watched entries leave their tensor.")
    for sums in (window["sum"], window["square"]):
        for index, told in sums.items():
            if (
                index not in window["watched"]
                or _named(told, tensors).shape != _named(window["watched"][index], tensors).shape
            ):
                raise ConfigError("The state's watched entries and their gradients differ in number.")


def _phase(tuner: Tuner, phase: Any, tensors: Mapping[str, Tensor]) -> None:
    if (tuner._phase is None) != (phase is None):
        raise ConfigError("The state is of a method with a dense phase, or without one; this tuner's is the other.")
    if tuner._phase is None:
        return
    if not isinstance(phase, Mapping) or not isinstance(phase.get("on"), bool):
        raise ConfigError('The state\'s "phase" does not say whether it is on.')
    if not phase["on"]:
        return
    latents = [[_named(told, tensors) for told in group] for group in phase["latents"]]
    before = [_named(told, tensors) for told in phase["before"]]
    fits = len(latents) == len(tuner._phase.latents)
    fits = fits and all(len(a) == len(b) for a, b in zip(latents, tuner._phase.latents, strict=True))
    if fits and tuner.in_dense_phase:
        mine = [latent.shape for group in tuner._phase.latents for latent in group]
        fits = mine == [latent.shape for group in latents for latent in group]
    heads = [] if tuner._phase.kind.found else [t.parameter.shape for t in tuner._all.dense]
    if not fits or [t.shape for t in before] != heads:
        raise ConfigError("The saved dense phase is that of another model or method: its tensors have other shapes.")


def _named(told: Any, tensors: Mapping[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that a plain value stands for."""
    found = tensors.get(str(told.get("tensor"))) if isinstance(told, Mapping) else None
    if not isinstance(found, Tensor) or (dtype is not None and (found.dtype != dtype or found.ndim != 1)):
        raise ConfigError(f"The state names a tensor {told!r} that it does not hold, or one of another kind.")
    return found


def _ascends(indices: Tensor) -> bool:
    return bool((indices[1:] > indices[:-1]).all())


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
