"""When entries were selected, and how many gradients they were given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selectune.errors import ConfigError
from selectune.study.analysis.supports import Support


def histogram(support: Support) -> dict[int, int]:
    """How many entries each step selected: {step: count}, for steps that selected any."""
    counts: Counter[int] = Counter()
    for steps in _known(support).values():
        counts.update(steps.tolist())
    return dict(sorted(counts.items()))


def by_tensor(support: Support) -> list[dict[str, Any]]:
    """For each tensor with selected entries: how many, and the first, median and last step that selected one."""
    rows = []
    for name in support.sizes:
        if name in support.entries:
            steps = _known(support)[name].sort().values
            first, middle, last = (int(steps[at]) for at in (0, (steps.numel() - 1) // 2, -1))
            rows.append({"name": name, "selected": steps.numel(), "first": first, "median": middle, "last": last})
    return rows


def _known(support: Support) -> Mapping[str, Tensor]:
    if support.steps is None:
        raise ConfigError(
            "The delta does not say when its scalars were selected: it was saved with order=False or by an older "
            "selectune, or its method also drops scalars."
        )
    return support.steps


@dataclass(frozen=True)
class Updates:
    """Gradients that selected scalars are given over a run, each counted once a step.

    `given`: sum over s of u_s (T - s). `static`: T B, had all of them been selected at step 0. `uniform`:
    (T + 1) B / 2, if every step selects B / T; it equals `given` only if T divides B.
    """

    given: int
    static: int
    uniform: float

    @property
    def ratio(self) -> float:
        """given / static; (T + 1) / (2 T) for the uniform schedule."""
        return self.given / self.static if self.static else float("nan")


def update_counts(quotas: Sequence[int]) -> Updates:
    """How many gradients a run of T = len(quotas) steps gives, if step s selects quotas[s] entries and none leaves.

    This counts scalars that are given a gradient; it is no count of operations, and promises no speed.
    Source: Agarwal et al. (2025), arXiv 2408.14470.

    >>> update_counts([3, 3, 3, 3])
    Updates(given=30, static=48, uniform=30.0)
    >>> update_counts([2, 3, 2, 3]).given
    24
    """
    steps, budget = len(quotas), sum(quotas)
    return Updates(sum(u * (steps - s) for s, u in enumerate(quotas)), steps * budget, (steps + 1) * budget / 2)
