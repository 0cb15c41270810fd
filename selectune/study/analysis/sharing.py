"""What several supports share, and what chance would give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from selectune.errors import BaseMismatchError, ConfigError
from selectune.study.analysis.supports import Support


def shared(first: Support, second: Support) -> dict[str, Any]:
    """How much two selections share: |A n B|, Jaccard |A n B| / |A u B| and overlap |A n B| / min(|A|, |B|).

    `chance`: the same three if the second were |B| entries drawn from all N in scope; its shared entries are
    |A| |B| / N on average. `chance_within`: if each tensor kept its number of entries and they were drawn within the
    tensor: the sum of a_j b_j / n_j. What exceeds the latter is agreement on entries, and not only on tensors. N is
    that of the tensors that either run has in scope. Raises BaseMismatchError for tensors of different sizes.
    """
    sizes = {**first.sizes, **second.sizes}
    other = [name for name in first.sizes.keys() & second.sizes.keys() if first.sizes[name] != second.sizes[name]]
    if other:
        name = min(other)
        raise BaseMismatchError(
            f'"{name}" has {first.sizes[name]:,} entries in one run and {second.sizes[name]:,} in the other, so their '
            "supports cannot be compared: they are of different models, heads or adapters."
        )
    none = torch.zeros(0, dtype=torch.int64)
    both, within, tensors = 0, 0.0, []
    for name, size in sizes.items():
        one, two = first.entries.get(name, none), second.entries.get(name, none)
        mine = int(torch.isin(one, two, assume_unique=True).sum())
        both += mine
        expected = one.numel() * two.numel() / size if size else 0.0
        within += expected
        if one.numel() and two.numel():
            tensors.append({
                "name": name, "first": one.numel(), "second": two.numel(), "shared": mine, "chance": expected
            })  # fmt: skip
    a, b = first.selected, second.selected
    return {
        "first": a, "second": b, **_measures(a, b, both),
        "chance": _measures(a, b, a * b / sum(sizes.values())), "chance_within": _measures(a, b, within),
        "tensors": tensors,
    }  # fmt: skip


def _measures(a: int, b: int, both: float) -> dict[str, float]:
    union, least = a + b - both, min(a, b)
    return {
        "shared": both, "jaccard": both / union if union else math.nan, "overlap": both / least if least else math.nan
    }  # fmt: skip


def overlaps(supports: Sequence[Support], names: Sequence[str]) -> dict[str, Any]:
    """`shared` for every pair, and as matrices of Jaccard, overlap and their levels by chance."""
    if len(supports) < 2:
        raise ConfigError(f"An overlap needs at least two runs; got {len(supports)}.")
    pairs = [
        {"names": [names[i], names[j]], **shared(supports[i], supports[j])}
        for i, j in itertools.combinations(range(len(supports)), 2)
    ]
    return {
        "names": list(names),
        "jaccard": _matrix(pairs, names, lambda pair: pair["jaccard"]),
        "overlap": _matrix(pairs, names, lambda pair: pair["overlap"]),
        "chance": _matrix(pairs, names, lambda pair: pair["chance"]["jaccard"]),
        "chance_within": _matrix(pairs, names, lambda pair: pair["chance_within"]["jaccard"]),
        "pairs": pairs,
    }


def _matrix(pairs: list[dict[str, Any]], names: Sequence[str], take: Any) -> list[list[float]]:
    rows = [[1.0] * len(names) for _ in names]
    for pair, (i, j) in zip(pairs, itertools.combinations(range(len(names)), 2), strict=True):
        rows[i][j] = rows[j][i] = take(pair)
    return rows
