"""The proof, from a base model and a delta alone, that the delta changes what it says and no more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from selectune.bits import gather, int_view
from selectune.delta.delta import Delta
from selectune.delta.file.fingerprint import _weights, is_weights
from selectune.delta.live import apply as live
from selectune.errors import BaseMismatchError, DeltaStateError, IntegrityError


@dataclass(frozen=True)
class Report:
    """What `Delta.verify` found. `ok` is the verdict; `problem` says why not."""

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
        """Everything that was asked holds."""
        return self.base and self.weights is not False and self.reverted and self.within_budget


def verify(delta: Delta, model: nn.Module, full: bool = False) -> Report:
    """Apply the delta to a bare base model, count what differs, revert, and compare every bit with before.

    Revert writes only where apply wrote, so if the digest of all weights is the same before and after, apply
    touched nothing but the support. Reads all weights twice. `full` also compares them with the recorded
    digest of the base.

    Raises DeltaStateError if a tuner or another delta is on the model, or if `full` is asked of a delta
    without that digest; IntegrityError if the model could not be put back. A wrong base is reported, not
    raised.
    """
    with live.exclusive(model, "verify"):
        return _verify(delta, model, full)


def _verify(delta: Delta, model: nn.Module, full: bool) -> Report:
    found = live.ready(model)
    if live.stack_of(model):
        raise DeltaStateError(f"{live.stack_of(model)[-1].label} is applied to the model; revert it before verifying")
    size = sum(entry.tensor.numel() for entry in delta.dense)
    recorded, budget = delta.info["base"]["weights"], delta.info["budget"]
    if full and recorded is None:
        raise DeltaStateError("the delta carries no digest of all weights; verify without full")
    before = _weights(found)
    weights = is_weights(found, delta.info["base"]) if full else None
    try:
        delta.apply(model)
    except BaseMismatchError as error:
        return Report(False, weights, 0, delta.selected, budget, size, True, str(error))
    changed = 0
    zeroed = {found.find[patch.name].name: patch for patch in delta.patches if patch.zeroed}
    try:
        for write in live.writes(delta, live.ready(model)):
            olds = live.stack_of(model)[-1].olds[write.name][1]
            if write.name in zeroed:
                patch = zeroed[write.name]
                changed += int((int_view(patch.values) != int_view(gather(olds, patch.indices))).sum())
            elif write.indices is not None:
                changed += int((int_view(write.old) != int_view(olds)).sum())
    finally:
        delta.revert(model)
    reverted = _weights(live.ready(model)) == before
    if not reverted:
        raise IntegrityError("the model does not have the bits it had before the delta was applied and reverted")
    problem = None
    if weights is False:
        problem = "some weight that the delta does not write is not the base's"
    elif budget is not None and changed > budget:
        problem = f"{changed} scalars differ; the budget is {budget}"
    zeros = sum(patch.numel - patch.indices.numel() for patch in zeroed.values())
    return Report(True, weights, changed, delta.selected, budget, size, reverted, problem, zeros)
