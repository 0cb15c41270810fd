"""The entries that a run selected of the tensors in its scope, and the step at which each was selected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from selectune.delta import Delta, canonical_name, structure_digest
from selectune.errors import BaseMismatchError, ConfigError
from selectune.schedule import Increment, OneShot, Quotas, Rounds
from selectune.scope import Scope

_GROWING = {kind.__name__: kind for kind in (Increment, OneShot, Quotas, Rounds)}


@dataclass(frozen=True, eq=False)
class Support:
    """A selection. Tied tensors count once.

    `sizes`: the entries of each of the M tensors in scope, in the model's order: weights, biases, norms, embeddings and
    the head alike, as far as the scope has them. `entries`: flat indices (n,), ascending, of the tensors that have any.
    `steps`: for each of them the step that selected it, counted from 0; None if that is not known.

    >>> import torch
    >>> entries = {"w": torch.tensor([0, 3]), "b": torch.tensor([1])}
    >>> support = Support({"w": 4, "b": 2}, entries, {"w": torch.tensor([0, 1]), "b": torch.tensor([1])})
    >>> support.selected, support.until(0).entries
    (3, {'w': tensor([0])})
    """

    sizes: Mapping[str, int]
    entries: Mapping[str, Tensor]
    steps: Mapping[str, Tensor] | None = None

    @property
    def selected(self) -> int:
        """B, the number of entries."""
        return sum(flat.numel() for flat in self.entries.values())

    @property
    def total(self) -> int:
        """N, the entries of all tensors in scope."""
        return sum(self.sizes.values())

    @property
    def first_step(self) -> int | None:
        """The first step that selected anything; None if steps are not known or nothing is selected."""
        return min((int(steps.min()) for steps in (self.steps or {}).values()), default=None)

    def until(self, step: int) -> Support:
        """The support after the selection of this step. Raises ConfigError if steps are not known."""
        if self.steps is None:
            raise ConfigError("The step of each entry is not known, so the support on the way is not known either.")
        masks = {name: steps <= step for name, steps in self.steps.items()}
        kept = [name for name, mask in masks.items() if bool(mask.any())]
        entries, steps = ({name: of[name][masks[name]] for name in kept} for of in (self.entries, self.steps))
        return replace(self, entries=entries, steps=steps)


def support_of(delta: Delta, model: nn.Module) -> Support:
    """The support of a delta. `model`: its base, with the delta on it or without; only names and shapes count.

    Whole tensors, which are outside the budget, do not belong to it. Raises BaseMismatchError for a model with other
    tensors, and ConfigError for a delta without selected scalars.
    """
    if not delta.patches:
        why = (
            f"it trains {len(delta.dense)} tensors whole"
            if delta.dense
            else "it is empty: no scalar was selected in it"
        )
        raise ConfigError(
            f"{delta.label} has no support to analyse: {why}. A run of full fine-tuning is what others are "
            "compared with (command line: --full)."
        )
    if structure_digest(model) != delta.info["base"]["structure"]:
        raise BaseMismatchError(
            f"{type(model).__name__} is not the base of {delta.label}: its tensors, their shapes, dtypes or ties are "
            "others. Give the base that the run started from."
        )
    told = delta.info["method"].get("scope")
    scope = Scope(**told) if isinstance(told, Mapping) else Scope()
    sizes = {canonical_name(t.name): t.parameter.numel() for t in scope.find(model, loaded=False).tensors}
    outside = [name for name in delta.support if name not in sizes]
    if outside:  # a sum of deltas of several scopes, say
        sizes = {canonical_name(name): p.numel() for name, p in model.named_parameters()}
    return Support(sizes, delta.support, steps_of(delta))


def steps_of(delta: Delta) -> dict[str, Tensor] | None:
    """The step, from 0, at which each entry of a delta was selected: {name: (n,) int64}, aligned with its support.

    A static mask is selected at step 0. Else the delta has the step of each entry, or the full order, and its schedule
    says how many entries each step selects. None if neither is there (`Tuner.save(order=False)`), if the schedule is
    not one of ours, or if entries also leave the support. An entry that a step could not find (the event `shortfall`)
    counts at the step that asked for it.
    """
    told = delta.info["method"].get("schedule")
    kind = _GROWING.get(told.get("name", "")) if isinstance(told, Mapping) else None
    if kind is None or not isinstance(told, Mapping):
        return None
    if kind is OneShot:
        return {name: torch.zeros_like(flat) for name, flat in delta.support.items()}
    ranks = {patch.name: patch.order.long() for patch in delta.patches if patch.order is not None}
    if not ranks:
        return None
    flat = torch.cat(list(ranks.values()))
    if not torch.equal(flat.sort().values, torch.arange(flat.numel())):
        return ranks  # entries of one step share their rank, which is that step
    fields = {name: value for name, value in told.items() if name != "name"}
    if kind is not Quotas:
        fields["budget"] = delta.info["budget"]
    schedule = kind(**fields)
    last = int(fields["steps"]) if kind is not Quotas else len(fields["quotas"])
    reached, most = [], 0
    for step in range(last):
        most = max(most, schedule.target(step)) if schedule.due(step) else most
        reached.append(most)
    ends = torch.tensor(reached)
    return {name: torch.searchsorted(ends, rank, right=True).clamp_(max=last - 1) for name, rank in ranks.items()}
