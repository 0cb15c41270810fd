"""Over how many tensors a selection spreads, and how evenly: tensor sparsity, three entropies, and their series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from selectune.errors import ConfigError
from selectune.study.analysis.supports import Support

POINTS = 200
"""A series has a point for every step up to so many steps, and as many evenly spaced ones beyond."""


@dataclass(frozen=True)
class Entropies:
    """Entropies of P_j = |P_j n L| / |P_j|, the selected share of tensor j of M, in nats. NaN if nothing is selected.

    `normalised`: -sum p ln p of p_j = P_j / sum P. `relative`: that over ln M, from 0 to 1. `raw`: the mean of
    -P_j ln P_j, without normalising, which falls as P_j comes near 1. `bernoulli`: the mean of the entropies of one
    yes or no with probability P_j. P_j divides by the size of a tensor, so small tensors weigh much.
    Source: Agarwal et al. (2025), arXiv 2408.14470; the paper does not say which of them it plots.
    """

    normalised: float
    relative: float
    raw: float
    bernoulli: float


def entropies(shares: Sequence[float]) -> Entropies:
    """The entropies of the selected shares P_j (M,).

    >>> found = entropies([0.5, 0.25, 0.0, 0.25])
    >>> [round(value, 5) for value in (found.normalised, found.relative, found.raw, found.bernoulli)]
    [1.03972, 0.75, 0.25993, 0.45445]
    """
    if not all(0 <= share <= 1 for share in shares):
        raise ConfigError(f"Shares of tensors lie from 0 to 1; got {min(shares):g} to {max(shares):g}.")
    whole, count = math.fsum(shares), len(shares)
    if not whole:
        return Entropies(*[math.nan] * 4)
    normalised = math.fsum(_part(share / whole) for share in shares)
    return Entropies(
        normalised,
        normalised / math.log(count) if count > 1 else 0.0,
        math.fsum(map(_part, shares)) / count,
        math.fsum(_part(share) + _part(1 - share) for share in shares) / count,
    )


def _part(share: float) -> float:
    return -share * math.log(share) if share else 0.0


def shares(support: Support) -> list[float]:
    """P_j of each tensor in scope."""
    none = torch.zeros(0)
    return [support.entries.get(name, none).numel() / size if size else 0.0 for name, size in support.sizes.items()]


def untouched(support: Support) -> int:
    """How many tensors in scope hold no selected entry; tensor sparsity TS is this over their number M."""
    return sum(name not in support.entries or not support.entries[name].numel() for name in support.sizes)


def spread(support: Support) -> dict[str, float]:
    """Tensor sparsity and the entropies of one selection."""
    count = untouched(support)
    return {
        "selected": support.selected, "untouched": count, "tensor_sparsity": count / len(support.sizes),
        **asdict(entropies(shares(support))),
    }  # fmt: skip


def series(support: Support, steps: int | None = None) -> dict[str, Any]:
    """`spread` after 0, 1, 2, ... steps of a run of `steps`: lists under the same keys, and `steps` itself.

    After 0 steps nothing is selected, so tensor sparsity is 1 and the entropies are NaN. Raises ConfigError if the
    support does not know its steps.
    """
    known = support.until(-1)  # or it raises
    times = {name: found.sort().values for name, found in (support.steps or {}).items()}
    last = max([steps or 0, *(int(found[-1]) + 1 for found in times.values())])
    at = torch.linspace(0, last, min(last, POINTS) + 1).round().long().unique()
    none = torch.zeros(0, dtype=torch.int64)
    counts = {name: torch.searchsorted(times.get(name, none), at).tolist() for name in support.sizes}
    rows = []
    for column in range(len(at)):
        mine = {name: none.new_empty(row[column]) for name, row in counts.items() if row[column]}
        rows.append(spread(Support(known.sizes, mine)))
    return {"steps": at.tolist(), **{key: [row[key] for row in rows] for key in rows[0]}}


def series_of(snapshots: Sequence[tuple[int, Support]]) -> dict[str, Any]:
    """The same from (steps taken, support) of several times.

    A delta holds every entry that was ever selected, so of a method that also drops entries this is the cumulative
    series. `Tuner.support` has the present entries.
    """
    if not snapshots:
        raise ConfigError("A series needs the support of at least one time.")
    rows = [spread(Support(snapshots[0][1].sizes, {})), *(spread(support) for _, support in snapshots)]
    return {"steps": [0, *(step for step, _ in snapshots)], **{key: [row[key] for row in rows] for key in rows[0]}}
