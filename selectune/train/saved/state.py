"""The state of a run between two steps: tensors and plain JSON values; its file; and how a tuner continues from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as files
from torch import Tensor

from selectune.bits import DTYPES
from selectune.delta import digest_bits
from selectune.errors import DeltaError, DeltaFormatError, TunerError
from selectune.files import read_owned, write_durably
from selectune.files.reading import NotPlain, plain, short
from selectune.train.engine import Engine
from selectune.train.saved.checked import PAGE, VERSION, checked, starts_elsewhere
from selectune.train.saved.forms import own, packed
from selectune.train.support.pages import Page

STATE_FILE = "tuner.safetensors"
"""Name of a state's file in a checkpoint."""

MAX_HEADER, MAX_TENSORS = 1 << 26, 1 << 17

_HEADER = "selectune_state"
_MOST = 2**64 - 1  # of an integer: a seed


def state_of(engine: Engine) -> dict[str, Any]:
    """See `Tuner.state_dict`."""
    tracker, ledger, phase = engine.tracker, engine.ledger, engine.phase
    tracker.between_steps()
    if not engine.chooser.dense:
        tracker.write_weights()
    tensors: dict[str, Tensor] = {"offsets": own(ledger.offsets), "start": own(ledger.start)}
    tensors["free"] = own(ledger.free)
    for tensor, page in zip(ledger.tensors, ledger.pages, strict=True):
        for part in PAGE:
            tensors[f"page.{tensor.index}.{part}"] = own(getattr(page, part))
        tensors[f"page.{tensor.index}.retired_now"] = own(ledger.store.read(tensor.index, page.retired))
    tensors |= {f"whole.{t.name}": own(t.parameter) for t in engine.found.whole}
    tensors |= {f"buffer.{n}": own(b) for n, b in engine.model.named_buffers() if n in engine.base.buffers}
    info = {
        "version": VERSION,
        "run": _run(engine),
        "step": tracker.step,
        "reached": sorted(tracker.reached),
        "restarted": starts_elsewhere(ledger, tensors),
        "events": dict(tracker.events),
        "chooser": packed(engine.chooser.state(), "chooser", tensors),
        "phase": None if phase is None else packed(phase.phase(), "phase", tensors),
    }
    return {"info": json.loads(json.dumps(info, allow_nan=False)), "tensors": tensors}  # as a file would give it back


def write_state(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Writes what `Tuner.state_dict` gave as one safetensors file, durably and atomically; no pickle.

    The plain values are JSON in the file's header, with a digest of it all. Raises DeltaError that names the path.
    """
    info, tensors = dict(state["info"]), dict(state["tensors"])
    header = {_HEADER: json.dumps({"info": info, "digest": _digest(info, tensors)}, allow_nan=False, sort_keys=True)}
    odd = [key for key, tensor in tensors.items() if tensor.dtype not in DTYPES.values()]
    if odd:
        raise DeltaError(f"cannot write {path}: {odd[0]} has dtype {tensors[odd[0]].dtype}, which is not read")
    data = files.save(tensors, header)
    if len(tensors) > MAX_TENSORS or 8 + int.from_bytes(data[:8], "little") > MAX_HEADER:
        raise DeltaError(
            f"cannot write {path}: the state has {len(tensors):,} tensors, and {MAX_TENSORS:,} are read, within a "
            f"header of {MAX_HEADER:,} bytes; select fewer tensors (Scope)"
        )
    return write_durably(path, data)


def read_state(path: str | Path) -> dict[str, Any]:
    """Reads what `write_state` wrote, for `Tuner.load_state_dict`; the tensors are views of the file's one copy.

    Raises DeltaError where the file cannot be read, DeltaFormatError where it holds no state or a damaged one.
    """
    data = read_owned(path)
    try:
        tensors, text = _tensors(data)
        found = plain(text.encode(), most=_MOST)
        if not isinstance(found, dict) or found.keys() != {"info", "digest"} or not isinstance(found["info"], dict):
            raise NotPlain('does not hold "info" and "digest"')
    except (NotPlain, UnicodeEncodeError) as why:
        raise DeltaFormatError(f"{path} holds no state of a tuner, or a damaged one: it {why}") from why
    info = found["info"]
    if found["digest"] != _digest(info, tensors):
        raise DeltaFormatError(f"{path} is damaged: its content does not have the digest it was written with.")
    return {"info": info, "tensors": tensors}


def _tensors(data: bytearray) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, in its memory, and the text in its header; NotPlain for any other bytes."""
    begin = 8 + int.from_bytes(data[:8], "little")
    if not 8 < begin <= min(len(data), MAX_HEADER):
        raise NotPlain(f"has no header of at most {MAX_HEADER:,} bytes")
    if sum(data.count(mark, 0, begin) for mark in (b"{", b"[")) > 4 * MAX_TENSORS:
        raise NotPlain(f"names more than {MAX_TENSORS:,} tensors")
    head = plain(data[8:begin])
    metadata = head.pop("__metadata__", None) if isinstance(head, dict) else None
    if not isinstance(metadata, dict) or metadata.keys() != {_HEADER} or not isinstance(metadata[_HEADER], str):
        raise NotPlain(f'has no "{_HEADER}" in its header')
    tensors, end = {}, begin
    for key, entry in sorted(head.items(), key=_place):
        dtype, shape = DTYPES.get(str(entry["dtype"])), entry["shape"]
        if dtype is None or not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise NotPlain(f"has a tensor {short(key)} of no dtype or shape")
        start, count = end, math.prod(shape)
        end = start + count * dtype.itemsize
        if entry["data_offsets"] != [start - begin, end - begin] or end > len(data):
            raise NotPlain(f"has a tensor {short(key)} that does not lie behind the one before it")
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
        try:
            tensors[key] = flat.view(shape)
        except RuntimeError as error:
            raise NotPlain(f"has a tensor {short(key)} of too many dimensions") from error
    if end != len(data):
        raise NotPlain(f"has {len(data) - end:,} bytes behind its last tensor")
    return tensors, metadata[_HEADER]


def _place(named: tuple[str, Any]) -> tuple[int, int]:
    entry = named[1]
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise NotPlain(f"has a tensor {short(named[0])} that is not described as safetensors does")
    where = entry["data_offsets"]
    if not isinstance(where, list) or len(where) != 2 or not all(type(at) is int for at in where):
        raise NotPlain(f"has a tensor {short(named[0])} without a place")
    return where[0], where[1]


def _digest(info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for key in sorted(tensors):
        found.update(f"{key}={digest_bits(tensors[key].cpu())};".encode())
    return found.hexdigest()


@torch.no_grad()
def load_into(engine: Engine, state: Mapping[str, Any]) -> None:
    """See `Tuner.load_state_dict`."""
    tracker, ledger, chooser = engine.tracker, engine.ledger, engine.chooser
    if tracker.in_step:
        raise TunerError("A state is loaded between steps; optimizer.step() is running. Load it before or after.")
    info, tensors = checked(engine, state, _run(engine))
    unread = chooser.rescore is not None and not ledger.touched  # scores from attach wait for the first selection
    tracker.restart()
    ledger.write_base()
    for tensor in ledger.tensors:
        flat, slot, base, *retired = (own(tensors[f"page.{tensor.index}.{part}"]) for part in PAGE)
        page = Page(flat, slot, base, retired[0], retired[1]).to(tensor.form.device, ledger.offsets.device)
        ledger.pages[tensor.index] = page
        ledger.store.write(tensor.index, page.retired, tensors[f"page.{tensor.index}.retired_now"])
    ledger.changes += 1  # copies made of the pages are stale
    ledger.offsets.copy_(tensors["offsets"])
    ledger.start.copy_(tensors["start"])
    ledger.free = tensors["free"].to(ledger.offsets.device, copy=True)
    for tensor in engine.found.whole:
        tensor.parameter.copy_(tensors[f"whole.{tensor.name}"])
    for name, buffer in engine.model.named_buffers():
        if f"buffer.{name}" in tensors:
            buffer.copy_(tensors[f"buffer.{name}"])
    chooser.load_state(info["chooser"])
    if unread and chooser.rescore is not None and ledger.touched:
        chooser.rescore()  # the run used them up before this state was taken
    tracker.load_state(info["step"], info["reached"], info["events"])
    if engine.phase is not None:
        if not chooser.dense:
            ledger.write_weights()
        engine.phase.load_phase(info["phase"])
    tracker.follow_phase()
    tracker.switch_phase()
    for parameter in engine.parameters():
        parameter.grad = None  # of a step that will not be taken
    engine.step_hooks.strangers()


def _run(engine: Engine) -> dict[str, Any]:
    """The facts that must be the same in both processes."""
    base = {name: str(total % (1 << 64)) for name, total in engine.base.sums.items()}
    heads = {tensor.name: digest_bits(engine.base.whole[tensor.name].cpu()) for tensor in engine.found.whole}
    return {
        "method": engine.method.describe(),
        "seed": engine.seed,
        "accumulation_steps": engine.tracker.accumulation_steps,
        "budget": engine.budget,
        "base": {**base, **heads},
    }
