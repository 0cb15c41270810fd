"""Makes the delta of a run: what goes into the file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selectune.bits import same_bits
from selectune.delta import Delta, Dense, Patch, adapter_of, canonical_name, digest_bits, model_info, versions
from selectune.errors import ConfigError, NonFiniteError, NothingTrainedError, ScopeError, some
from selectune.scope import ScopedTensor
from selectune.train.choose.growing import Growing
from selectune.train.engine import Engine
from selectune.train.saved.base_digests import base_of
from selectune.train.support.ledger import Ledger

log = logging.getLogger("selectune")


def delta_of(
    engine: Engine,
    changed: int,
    base: Mapping[str, Any] | None,
    more: Mapping[str, Mapping[str, Any]],
    old_values: bool,
    order: bool | None,
    allow_empty: bool,
    full: bool,
) -> Delta:
    """The delta of a run. Raises NothingTrainedError if it is empty and NonFiniteError for NaN or infinity."""
    model, found, ledger, before = engine.model, engine.now, engine.ledger, engine.base
    info = {
        "method": {**engine.method.describe(), "seed": engine.seed},
        "budget": engine.budget if found.tensors and engine.schedule is not None and engine.schedule.keeps else None,
        "base": base_of(model, ledger, before, base, full),
    }
    adapter = adapter_of(model)
    described = {"module": None if adapter is None else adapter.info, "model": model_info(model, sharded=True)}
    info |= {key: value for key, value in described.items() if value is not None}
    info = _with_more({**info, "versions": versions()}, more)
    ranks = _steps(engine) if order is None else _ranks(ledger) if order else {}
    patches = [
        _patch(t, ledger, old_values, ranks.get(t.index), before.filled.get(t.name))
        for t in found.tensors
        if ledger.pages[t.index].touched()[0].numel() or t.name in before.filled
    ]
    dense = [_dense(t.name, "parameter", t.parameter, before.whole[t.name], old_values) for t in found.whole]
    dense += [_dense(n, "buffer", b, before.buffers[n], old_values) for n, b in before.changed_buffers(model).items()]
    moved = changed or any(not same_bits(before.whole[t.name], t.parameter) for t in found.whole)
    if not moved and not allow_empty:
        why = "no scalar was selected" if not ledger.selected and not found.whole else "no trained scalar moved"
        raise NothingTrainedError(
            f"There is nothing to save: {why}. Did loss.backward() and optimizer.step() run, with a learning rate "
            "above 0 and an optimizer over tuner.parameters()? (allow_empty=True saves an empty delta.)"
        )
    for part in (*((p.name, p.values) for p in patches), *((d.name, d.tensor) for d in dense)):
        if part[1].is_floating_point() and not bool(torch.isfinite(part[1]).all()):
            raise NonFiniteError(f'Trained values of "{part[0]}" are NaN or infinite; the delta is not saved.')
    unreached = engine.unreached()
    if unreached:
        log.warning("Selected entries of %s never got a gradient.", some(unreached))
    info["selected"] = sum(p.indices.numel() for p in patches)
    return Delta(patches, dense, info)


def _with_more(info: Mapping[str, Any], more: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The info with the caller's fields added; ConfigError for a field that the run records itself."""
    found = dict(info)
    for name, fields in more.items():
        if name not in ("method", "versions") or not isinstance(fields, Mapping):
            raise ConfigError(f'info= takes fields of "method" and of "versions", by name; got {name!r}: {fields!r}.')
        taken = sorted(set(found[name]) & set(fields))
        if taken:
            raise ConfigError(f"info= names fields of '{name}' that the run records itself: {', '.join(taken)}.")
        found[name] = {**found[name], **fields}
    return found


def _ranks(ledger: Ledger) -> dict[int, Tensor]:
    """Ranks (n + r,) per tensor: slots are numbered in order of selection, retired entries come last."""
    ranks = {}
    for index, page in enumerate(ledger.pages):
        flat, _ = page.touched()
        rank = torch.full(flat.shape, ledger.offsets.numel(), dtype=torch.int64)
        rank[torch.searchsorted(flat, page.flat).cpu()] = page.slot.cpu()
        ranks[index] = rank
    return ranks


def _steps(engine: Engine) -> dict[int, Tensor]:
    """The step that selected each entry, per tensor, if the support grows step by step; else nothing.

    It follows from the schedule: an entry that its step could not find counts at the step that asked for it.
    """
    schedule, ledger = engine.schedule, engine.ledger
    if type(engine.chooser) is not Growing or schedule is None or schedule.steps is None:
        return {}
    reached: list[int] = []
    for step in range(engine.tracker.step + 1):
        before = reached[-1] if reached else 0
        reached.append(schedule.target(step) if schedule.due(step) else before)
    ends = torch.tensor(reached)
    return {
        index: torch.searchsorted(ends, page.slot.cpu(), right=True).clamp_(max=len(reached) - 1)
        for index, page in enumerate(ledger.pages)
    }


def _patch(tensor: ScopedTensor, ledger: Ledger, old_values: bool, rank: Tensor | None, filled: Tensor | None) -> Patch:
    flat, base = ledger.pages[tensor.index].touched()
    quantised = tensor.quantised
    base = base if filled is None else filled
    return Patch(
        name=tensor.name,
        shape=tuple(tensor.form.shape),
        dtype=tensor.form.dtype,
        indices=flat.cpu(),
        values=ledger.store.read(tensor.index, flat).cpu(),
        base_digest=digest_bits(base.cpu()) if quantised is None else quantised.digest(),
        base_values=base.cpu().reshape(-1) if old_values and quantised is None else None,
        order=None if rank is None else rank.to(torch.int32),
        zeroed=filled is not None,
        beside=quantised is not None,
    )


def _dense(name: str, kind: str, now: Tensor, before: Tensor, old_values: bool) -> Dense:
    return Dense(
        name=name,
        kind=kind,
        tensor=now.detach().cpu().clone(),
        base_digest=digest_bits(before.cpu()),
        base_tensor=before.cpu() if old_values else None,
    )


def check_names(model: nn.Module) -> None:
    """Raises ScopeError if two parameters have one name in a delta, which leaves out what wrappers add to names."""
    seen: dict[str, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first, other = seen.setdefault(canonical_name(name), (name, parameter))
        if other is not parameter:
            raise ScopeError(
                f'The parameters "{first}" and "{name}" would have the same name in a delta, "{canonical_name(name)}": '
                "the components that DDP, torch.compile, FSDP and checkpointing add are left out. Rename one of them."
            )
