"""How far entries moved: by tensor, below a dtype's resolution, and against full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selectune import bits
from selectune.delta import Delta
from selectune.delta.combine.aligned import Rows, align
from selectune.errors import ConfigError
from selectune.study.analysis.supports import Support

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def spearman(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> float:
    """Spearman's rank correlation of two sequences (n,), ties by average ranks; NaN if one of them is constant.

    >>> round(spearman([1, 2, 2], [1, 2, 3]), 4), spearman([1, 2, 3, 4], [16, 9, 4, 1])
    (0.866, -1.0)
    """
    from scipy.stats import rankdata

    if len(first) != len(second):
        raise ConfigError(f"A correlation needs as many numbers on both sides; got {len(first)} and {len(second)}.")
    if len(first) < 2:
        return math.nan
    one, two = (torch.from_numpy(rankdata(torch.as_tensor(side).double().numpy())) for side in (first, second))
    one, two = one - one.mean(), two - two.mean()
    size = float((one.square().sum() * two.square().sum()).sqrt())
    return float((one * two).sum()) / size if size else math.nan


def moved(delta: Delta, base: nn.Module | None) -> list[dict[str, Any]]:
    """How far each tensor of a delta moved from its base, in the model's order.

    `entries` of the tensor, `written` by the delta, mean |value - base| over all entries (`mean_all`, zeros included)
    and over those written (`mean_written`). `unchanged`: written entries that have the base's bits. `below_epsilon`:
    those that moved by less than the epsilon of their dtype, which is its resolution at 1. `lost_in`: how many changes
    would be lost if base and value were rounded to a narrower dtype. `whole`: trained whole, outside the budget.

    `base`: the base model; None if the delta carries the base's values. Raises BaseMismatchError for another model.
    Source: Agarwal et al. (2025), arXiv 2408.14470, Fig. 8c, which does not say which of the two means it shows.
    """
    rows = []
    for row in align([delta], base):
        if row.kind != "parameter" or not row.dtype.is_floating_point:
            continue
        size, change = math.prod(row.shape), row.differences[0].abs()
        written, total = change.numel(), float(change.sum())
        changed = row.changed[0]
        rows.append({
            "name": row.name, "whole": row.whole, "entries": size, "written": written,
            "mean_all": total / size if size else 0.0, "mean_written": total / written if written else 0.0,
            "unchanged": written - int(changed.sum()),
            "below_epsilon": int((change < torch.finfo(row.dtype).eps).sum()),
            "lost_in": {name: _lost(row, dtype) for name, dtype in NARROW.items()},
        })  # fmt: skip
    return rows


def _lost(row: Rows, dtype: torch.dtype) -> int:
    now, before = (bits.int_view(side.to(dtype)) for side in (row.new[0], row.base))
    return int(((now == before) & row.changed[0]).sum())


def by_group(rows: Sequence[Mapping[str, Any]], groups: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The two means of `moved` over the tensors of each group. `groups`: {tensor's name: group}."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        own = sums.setdefault(groups[row["name"]], [0.0, 0, 0])
        for at, value in enumerate((row["mean_all"] * row["entries"], row["entries"], row["written"])):
            own[at] += value
    return {
        group: {"mean_all": total / size, "mean_written": total / written if written else 0.0, "written": written}
        for group, (total, size, written) in sums.items()
    }


def against_full(delta: Delta, full: Delta, base: nn.Module, support: Support, seed: int = 0) -> dict[str, Any]:
    """Whether selected entries moved far where full fine-tuning moves far.

    I is the set of entries in scope that were selected and moved. `rho`: Spearman of |change| in both runs over I.
    `control`: the same over as many entries drawn from the whole scope, where most entries of the selective run moved
    by 0 (`control_moved` counts the others). `inside` and `outside`: quantiles of full fine-tuning's |change| over I,
    and over as many entries drawn from outside the support. Without these a high rho says little.

    Both runs must start from one base, head included: the same seed. Raises BaseMismatchError if they do not.
    Source: Agarwal et al. (2025), arXiv 2408.14470, Fig. 8a and 8b.
    """
    rows = {row.name: row for row in align([delta, full], base) if row.kind == "parameter"}
    inside = {}
    for name, flat in support.entries.items():
        own = _changes(rows[name], 0, flat)
        inside[name] = flat[own > 0]
    count = sum(flat.numel() for flat in inside.values())
    if count < 2:
        raise ConfigError(f"{delta.label} moved {count} selected scalars; a correlation needs at least 2.")
    draw = torch.Generator().manual_seed(seed)
    anywhere = _drawn(support, count, draw, outside=False)
    outside = _drawn(support, count, draw, outside=True)
    one, two = (_together(rows, inside, which) for which in (0, 1))
    control = [_together(rows, anywhere, which) for which in (0, 1)]
    return {
        "entries": count,
        "rho": spearman(one, two),
        "control": spearman(*control),
        "control_entries": control[0].numel(),
        "control_moved": int((control[0] > 0).sum()),
        "quantiles": list(QUANTILES),
        "inside": _quantiles(two),
        "outside": _quantiles(_together(rows, outside, 1)),
        "seeds": [side.info["method"].get("seed") for side in (delta, full)],
        "drawn_with": seed,
    }


def _quantiles(values: Tensor) -> list[float]:
    ordered = values.sort().values
    return [float(ordered[round(q * (ordered.numel() - 1))]) for q in QUANTILES] if ordered.numel() else []


def _together(rows: Mapping[str, Rows], at: Mapping[str, Tensor], which: int) -> Tensor:
    """|change| of one of the two runs at these entries, (n,) float64."""
    return torch.cat([
        _changes(rows[name], which, flat) if name in rows else torch.zeros(flat.numel(), dtype=torch.float64)
        for name, flat in at.items()
    ])  # fmt: skip


def _changes(row: Rows, which: int, flat: Tensor) -> Tensor:
    """|change| (n,) of flat entries of a tensor; 0 where neither run writes."""
    change = row.differences[which].abs()
    if not change.numel():
        return torch.zeros(flat.numel(), dtype=torch.float64)
    at = torch.searchsorted(row.indices, flat).clamp_(max=change.numel() - 1)
    return torch.where(row.indices[at] == flat, change[at], 0.0)


def _drawn(support: Support, count: int, draw: torch.Generator, *, outside: bool) -> dict[str, Tensor]:
    """Entries in scope drawn evenly, none twice: `count` of them, or all there are. `outside`: not of the support."""
    total = support.total
    if total <= max(1 << 20, 8 * count):
        found = torch.randperm(total, generator=draw)
    else:  # of 4 times as many draws more than enough are left without repeated ones and those of the support
        found = torch.randint(total, (4 * count,), generator=draw).unique()
        found = found[torch.randperm(found.numel(), generator=draw)]
    ends = torch.cumsum(torch.tensor(list(support.sizes.values())), 0)
    if outside:
        held = [flat + ends[at] - size for at, (name, size) in enumerate(support.sizes.items())
                if (flat := support.entries.get(name)) is not None]  # fmt: skip
        found = found[torch.isin(found, torch.cat(held), invert=True)]
    found = found[:count].sort().values
    which = torch.searchsorted(ends, found, right=True)
    begins = ends - torch.tensor(list(support.sizes.values()))
    return {
        name: mine - begins[at]
        for at, name in enumerate(support.sizes)
        if (mine := found[which == at]).numel()
    }  # fmt: skip
