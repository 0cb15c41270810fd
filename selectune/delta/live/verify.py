"""The proof that a delta changes its own scalars of a base model and no others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from selectune.bits import gather, int_view
from selectune.delta.file.content import Content
from selectune.delta.file.fingerprint import is_weights, weights_of
from selectune.delta.live.apply import apply, revert
from selectune.delta.live.layers import exclusive, ready, stack_of
from selectune.errors import BaseMismatchError, DeltaStateError, IntegrityError


@dataclass(frozen=True)
class Report:
    """The result of `Delta.verify`. `ok` is the verdict; `problem` says why not."""

    base: bool  # the model has the base's structure, and its bits wherever the delta writes
    weights: bool | None  # every weight is the base's; None where that was not asked
    changed: int  # scalars of the patches whose bits differ after apply
    selected: int  # scalars in the patches
    budget: int | None
    dense: int  # entries of the tensors that are recorded whole
    reverted: bool  # after revert every parameter and buffer had the bits it had before
    problem: str | None
    zeroed: int = 0  # entries outside the support that the delta sets to 0; no part of the budget

    @property
    def within_budget(self) -> bool:
        """At most `budget` scalars differ (true where no budget is recorded)."""
        return self.budget is None or self.changed <= self.budget

    @property
    def ok(self) -> bool:
        """All checks that were asked for passed."""
        return self.base and self.weights is not False and self.reverted and self.within_budget


def verify(delta: Content, model: nn.Module, full: bool = False) -> Report:
    """See `Delta.verify`.

    Revert writes only where apply wrote. So if all weights have the same digest before and after, apply touched nothing
    but the support.
    """
    with exclusive(model, "verify"):
        found, layers = ready(model), stack_of(model)
        if layers:
            raise DeltaStateError(f"{layers[-1].label} is applied to the model; revert it before verifying")
        size = sum(entry.tensor.numel() for entry in delta.dense)
        base, budget = delta.info["base"], delta.info["budget"]
        if full and base["weights"] is None:
            raise DeltaStateError("the delta carries no digest of all weights; verify without full")
        before = weights_of(found)
        weights = is_weights(found, base) if full else None
        try:
            apply(delta, model)
        except BaseMismatchError as error:
            return Report(False, weights, 0, delta.selected, budget, size, True, str(error))
        try:
            changed = _changed(delta, model)
        finally:
            revert(delta, model)
        if weights_of(ready(model)) != before:
            raise IntegrityError("the model does not have the bits it had before the delta was applied and reverted")
    problem = None
    if weights is False:
        problem = "some weight that the delta does not write is not the base's"
    elif budget is not None and changed > budget:
        problem = f"{changed} scalars differ; the budget is {budget}"
    zeros = sum(patch.numel - patch.indices.numel() for patch in delta.patches if patch.zeroed)
    return Report(True, weights, changed, delta.selected, budget, size, True, problem, zeros)


def _changed(delta: Content, model: nn.Module) -> int:
    """How many scalars of the patches differ from the base, now that the delta is applied."""
    found, olds, changed = ready(model), stack_of(model)[-1].olds, 0
    for patch in delta.patches:
        entry = found.find[patch.name]
        old = olds[entry.name][1]
        before = gather(old, patch.indices) if patch.zeroed else old
        changed += int((int_view(gather(entry.tensor, patch.indices)) != int_view(before)).sum())
    return changed
