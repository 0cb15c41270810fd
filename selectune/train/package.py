"""From a ledger to a delta: what the base was, that nothing else moved, what goes into the file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from selectune import ops
from selectune.delta import Delta, Dense, Patch, canonical_name, digest_bits, model_info, module_of, versions
from selectune.errors import ConfigError, IntegrityError, NonFiniteError, NothingTrainedError, ScopeError
from selectune.method import Method
from selectune.scope import Found, ScopedTensor, is_own
from selectune.train.base import base_of
from selectune.train.ledger import Ledger
from selectune.types import Reads, Schedule

log = logging.getLogger("selectune")


@dataclass(frozen=True)
class Verification:
    """What `Tuner.verify` found: scalars that differ from the base, counted by their bits."""

    changed: int
    selected: int
    touched: int
    budget: int
    dense: int
    tensors: int
    zeroed: int = 0  # entries outside the support that the method's fill set to 0


class BaseCopy:
    """What it takes to see and to undo changes: a checksum a frozen tensor, a copy of dense tensors and buffers."""

    def __init__(self, model: nn.Module, found: Found) -> None:
        self.scoped = {id(t.parameter): t for t in found.tensors}
        self.dense = {t.name: t.parameter.detach().clone() for t in found.dense}
        whole = {id(t.parameter) for t in found.dense}
        self.sums = {n: ops.checksum(p) for n, p in model.named_parameters() if id(p) not in whole}
        self.buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        self.filled: dict[str, Tensor] = {}
        self.objects = dict(model.named_parameters(remove_duplicate=False))
        self.digests: dict[str, str] = {}  # of the base's tensors, as far as they were asked for: it never changes

    @torch.no_grad()
    def zero_unselected(self, model: nn.Module, ledger: Ledger) -> None:
        """Sets all of the scope to 0 but the support, and keeps a copy of what was there: no entry is trained yet."""
        self.filled = {t.name: t.parameter.detach().clone() for t in self.scoped.values()}
        for tensor in self.scoped.values():
            page = ledger.pages[tensor.index]
            tensor.parameter.zero_()
            ops.scatter_entries(tensor.parameter.detach(), page.flat, page.base)
        names = {id(p): n for n, p in model.named_parameters()}
        self.sums |= {names[id(t.parameter)]: ops.checksum(t.parameter) for t in self.scoped.values()}

    def hold(self, tensors: Sequence[ScopedTensor], ledger: Ledger) -> None:
        """Copies of tensors in scope that are to be trained wholly for a while; touched entries as they were."""
        for tensor in tensors:
            copy = tensor.parameter.detach().clone()
            ops.scatter_entries(copy, *ledger.pages[tensor.index].touched())
            self.dense[tensor.name] = copy

    def held(self, tensor: ScopedTensor) -> Tensor:
        """The base of a tensor that is trained wholly, where its weight is now."""
        copy = self.dense[tensor.name]
        if copy.device != tensor.parameter.device:
            copy = self.dense[tensor.name] = copy.to(tensor.parameter.device)
        return copy

    def release(self, tensors: Sequence[ScopedTensor]) -> None:
        for tensor in tensors:
            self.dense.pop(tensor.name, None)

    def check(self, model: nn.Module, ledger: Ledger) -> None:
        """Raises IntegrityError where a parameter joined, left or was replaced, or a frozen entry moved."""
        now = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not is_own(n)}
        joined, gone = sorted(now.keys() - self.objects.keys()), sorted(self.objects.keys() - now.keys())
        replaced = self.replaced(now)
        if joined:
            raise IntegrityError(
                f"{len(joined)} parameters joined the model after attach: {_some(joined)}. The tuner neither follows "
                "nor saves them, so the delta would be incomplete. Build the whole model first, then attach; "
                "Scope(train_fully=...) trains a new head wholly."
            )
        if replaced or gone:
            what = "were replaced by other Parameters" if replaced else "left the model"
            raise IntegrityError(
                f"{len(replaced or gone)} parameters {what} since attach: {_some(replaced or gone)}. The tuner follows "
                "those that were there. Change the model first (resize embeddings, add heads), then attach."
            )
        moved = self.moved(model, ledger)
        if moved:
            raise IntegrityError(
                f"{len(moved)} tensors changed outside the support since attach: {_some(moved)}. Something besides the "
                "tuner wrote into the frozen weights: load_state_dict, an optimizer, or the model's own forward "
                "(tensors that it writes can be kept out: Scope(exclude=...))."
            )

    def replaced(self, now: Mapping[str, Tensor]) -> list[str]:
        """Names under which other Parameters stand than at attach."""
        return [name for name, parameter in self.objects.items() if name in now and now[name] is not parameter]

    def moved(self, model: nn.Module, ledger: Ledger) -> list[str]:
        """Names of tensors whose untouched entries are not the base's."""
        moved = []
        for name, before in self.sums.items():
            if name in self.dense:
                continue
            parameter = self.objects[name]
            tensor = self.scoped.get(id(parameter))
            now = ops.checksum(parameter.detach())
            if tensor is not None:
                flat, base = ledger.pages[tensor.index].touched()
                now += ops.checksum(base, flat) - ops.checksum(ops.gather_entries(parameter.detach(), flat), flat)
            if (now - before) % (1 << 64):
                moved.append(name)
        return moved

    def changed_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Persistent buffers whose bits differ from the base's (batch-norm statistics, say)."""
        persistent = set(model.state_dict().keys())
        now = dict(model.named_buffers())
        return {
            n: now[n].detach()
            for n, old in self.buffers.items()
            if n in persistent and n in now and not _same(old, now[n])
        }

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, before in self.dense.items():
            parameters[name].copy_(before)
        for tensor in self.scoped.values():
            if tensor.name in self.filled:
                tensor.parameter.copy_(self.filled[tensor.name])
        self.restore_buffers(model)

    @torch.no_grad()
    def restore_buffers(self, model: nn.Module) -> None:
        for name, buffer in model.named_buffers():
            old = self.buffers.get(name)
            if old is not None and not _same(old, buffer):
                buffer.copy_(old)


class Run(Protocol):
    """What of a tuner goes into a delta's info."""

    method: Method
    schedule: Schedule | None
    budget: int
    seed: int

    @property
    def model(self) -> nn.Module: ...
    @property
    def selected(self) -> int: ...
    @property
    def unreached(self) -> list[str]: ...


def delta_of(
    run: Run,
    found: Found,
    ledger: Ledger,
    before: BaseCopy,
    changed: int,
    base: Mapping[str, Any] | None,
    more: Mapping[str, Mapping[str, Any]],
    old_values: bool,
    order: bool,
    allow_empty: bool,
    full: bool,
) -> Delta:
    """The delta of a run; refuses one that is empty or not finite."""
    info = {
        "method": {**run.method.describe(), "seed": run.seed},
        "budget": run.budget if found.tensors and run.schedule is not None and run.schedule.keeps else None,
        "base": base_of(run.model, ledger, before, base, full),
    }
    made = {"module": module_of(run.model), "model": model_info(run.model)}
    info |= {key: value for key, value in made.items() if value is not None}
    info = _with_more({**info, "versions": versions()}, more)
    ranks = _ranks(ledger) if order else {}
    patches = [
        _patch(t, *ledger.pages[t.index].touched(), old_values, ranks.get(t.index), before.filled.get(t.name))
        for t in found.tensors
        if ledger.pages[t.index].touched()[0].numel() or t.name in before.filled
    ]
    dense = [_dense(t.name, "parameter", t.parameter, before.dense[t.name], old_values) for t in found.dense]
    dense += [
        _dense(n, "buffer", b, before.buffers[n], old_values) for n, b in before.changed_buffers(run.model).items()
    ]
    moved = changed or any(not _same(before.dense[t.name], t.parameter) for t in found.dense)
    if not moved and not allow_empty:
        why = "no scalar was selected" if not run.selected and not found.dense else "no trained scalar moved"
        raise NothingTrainedError(
            f"There is nothing to save: {why}. Did loss.backward() and optimizer.step() run, with a learning rate "
            "above 0 and an optimizer over tuner.parameters()? (allow_empty=True saves an empty delta.)"
        )
    for part in (*((p.name, p.values) for p in patches), *((d.name, d.tensor) for d in dense)):
        if part[1].is_floating_point() and not bool(torch.isfinite(part[1]).all()):
            raise NonFiniteError(f'Trained values of "{part[0]}" are NaN or infinite; the delta is not saved.')
    if run.unreached:
        log.warning("Selected entries of %s never got a gradient.", ", ".join(run.unreached[:5]))
    info["selected"] = sum(p.indices.numel() for p in patches)
    return Delta(patches, dense, info)


def _with_more(info: Mapping[str, Any], more: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The info with more fields in its open objects; what a run records itself is not the caller's to say."""
    found = dict(info)
    for name, fields in more.items():
        if name not in ("method", "versions") or not isinstance(fields, Mapping):
            raise ConfigError(f'info= takes fields of "method" and of "versions", by name; got {name!r}: {fields!r}.')
        taken = sorted(set(found[name]) & set(fields))
        if taken:
            raise ConfigError(f"info= names fields of '{name}' that the run records itself: {', '.join(taken)}.")
        found[name] = {**found[name], **fields}
    return found


def warn_of_zeros(method: Method, found: Found, budget: int) -> None:
    """LoRA's B matrices start at 0: when more zeros than the budget tie for the best score, order alone decides."""
    score = method.score
    if score is None or score.reads is not Reads.WEIGHT or getattr(method.select, "tie", "") != "order":
        return
    zero_wins = bool(torch.diff(score(torch.tensor([0.0, 1.0]))) < 0)
    weights = [t.parameter.detach().reshape(-1) for t in found.tensors] if zero_wins else []
    zeros = sum(ops.small_filter(w, 0.0)[0].numel() for w in weights if _has_zeros(w))
    if zeros > budget:
        log.warning(
            "At least %d scalars in scope are exactly 0, more than the budget of %d: the first of them in the model's "
            "order are selected. tie='random' spreads them.", zeros, budget,
        )  # fmt: skip


def _has_zeros(weight: Tensor) -> bool:
    """Whether a thousandth of a flat weight has a zero: a look, not a count."""
    step = max(1, weight.numel() // 1024)
    look = weight[step // 2 :: step]  # not the first ones: a row of padding is zero by rights
    return int(look.count_nonzero()) < look.numel()


def _ranks(ledger: Ledger) -> dict[int, Tensor]:
    """Rank of selection (n + r,) per tensor: slots are given in order of selection, retired entries come last."""
    ranks = {}
    for index, page in enumerate(ledger.pages):
        flat, _ = page.touched()
        rank = torch.full(flat.shape, ledger.offsets.numel(), dtype=torch.int64)
        rank[torch.searchsorted(flat, page.flat).cpu()] = page.slot.cpu()
        ranks[index] = rank
    return ranks


def _patch(
    tensor: ScopedTensor, flat: Tensor, base: Tensor, old_values: bool, rank: Tensor | None, filled: Tensor | None
) -> Patch:
    base = base if filled is None else filled
    return Patch(
        name=tensor.name,
        shape=tuple(tensor.parameter.shape),
        dtype=tensor.parameter.dtype,
        indices=flat.cpu(),
        values=ops.gather_entries(tensor.parameter.detach(), flat).cpu(),
        base_digest=digest_bits(base.cpu()),
        base_values=base.cpu().reshape(-1) if old_values else None,
        order=None if rank is None else rank.to(torch.int32),
        zeroed=filled is not None,
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
    """Raises ScopeError where a delta could not tell two parameters apart: it leaves out what wrappers add to names."""
    seen: dict[str, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first, other = seen.setdefault(canonical_name(name), (name, parameter))
        if other is not parameter:
            raise ScopeError(
                f'The parameters "{first}" and "{name}" would have the same name in a delta, "{canonical_name(name)}": '
                "the components that DDP, torch.compile, FSDP and checkpointing add are left out. Rename one of them."
            )


def written(names: Sequence[str]) -> str:
    """What is said of selected weights that are not what the tuner wrote."""
    return (
        f"Selected weights of {len(names)} tensors are not what the tuner wrote: {_some(names)}. Something besides it "
        "writes them, such as a clamp in the model's own forward, so what is trained is not what the model computes "
        "with. Keep these tensors out of the scope: Scope(exclude=...)."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((ops.bits(a) == ops.bits(b)).all())
