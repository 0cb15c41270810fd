"""Quotas: how a budget is divided among tensors before their entries are ranked.

size     in proportion to a tensor's number of entries
entropy  in proportion to that number times the entropy of the tensor's values
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from selectune.errors import BudgetError

BINS = 256  # of a histogram from a tensor's smallest to its largest value
_PIECE = 1 << 20  # values counted at once
_UNIT = 1 << 20  # a share is an integer, so that every machine divides alike


def divided(total: int, sizes: Sequence[int], shares: Sequence[int] | None = None) -> list[int]:
    """`total` entries among tensors of these sizes, in proportion to their shares (None: to their sizes).

    k_j = total s_j / sum s is rounded down, and the remaining entries go to the largest remainders, the earlier tensor
    first: exactly `total` in all. A tensor that would get more than its size is taken whole, and the rest is divided
    among the others; where all of these have share 0, by their sizes.

    >>> divided(10, [4, 100, 100], [6, 3, 1])
    [4, 5, 1]
    """
    whole = sum(sizes)
    if total > whole:
        raise BudgetError(f"{total:,} entries cannot be divided among tensors of {whole:,}.")
    counts = [0] * len(sizes)
    free = list(range(len(sizes)))
    wanted = sizes if shares is None else shares
    while True:
        rest = total - sum(counts)
        if not any(wanted[j] for j in free):
            wanted = sizes
        parts = {j: divmod(rest * wanted[j], sum(wanted[i] for i in free) or 1) for j in free}
        full = [j for j, (count, remainder) in parts.items() if count + (remainder > 0) > sizes[j]]
        if not full:
            break
        for j in full:
            counts[j] = sizes[j]
        free = [j for j in free if j not in full]
    for j, (count, _) in parts.items():
        counts[j] = count
    order = sorted(free, key=lambda j: (-parts[j][1], j))
    for j in order[: total - sum(counts)]:
        counts[j] += 1
    return counts


def entropy(values: Tensor) -> float:
    """H = -sum_b p_b ln p_b over a histogram of `BINS` equal bins from the smallest to the largest value, in nats.

    0 for a tensor without values or with one value only, at most ln 256. Values that are not finite are left out.
    Counts are whole numbers, so every device gives the same entropy.

    >>> import torch
    >>> round(entropy(torch.tensor([0.0, 0.0, 1.0, 1.0])), 4)  # ln 2
    0.6931
    """
    flat = values.detach().reshape(-1)
    flat = flat[torch.isfinite(flat)]
    if flat.numel() == 0:
        return 0.0
    low, high = flat.min().double(), flat.max().double()
    if not low < high:
        return 0.0
    counts = torch.zeros(BINS, dtype=torch.int64, device=flat.device)
    for piece in flat.split(_PIECE):
        bins = ((piece.double() - low) / (high - low) * BINS).long().clamp_(max=BINS - 1)
        counts += torch.bincount(bins, minlength=BINS)
    shares = [count / flat.numel() for count in counts.tolist() if count]
    return -math.fsum(p * math.log(p) for p in shares)


def by_size(weights: Iterable[Tensor]) -> None:
    """In proportion to the number of entries."""
    del weights


def by_entropy(weights: Iterable[Tensor]) -> list[int]:
    """In proportion to n H, a tensor's number of entries times the entropy of its values.

    A tensor of one value says nothing (LoRA's B is all 0 before training), and gets the mean H of the others' entries.
    The idea is from Kang et al. (2025), GEM, arXiv 2508.16191; the histogram and the factor n are ours.

    >>> import torch
    >>> two, four = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    >>> shares = by_entropy([two, four, torch.zeros(4)])
    >>> [round(share / shares[0], 4) for share in shares]
    [1.0, 2.0, 1.5]
    """
    told = [(weight.numel(), entropy(weight)) for weight in weights]
    counted = sum(size for size, found in told if found)
    mean = math.fsum(size * found for size, found in told) / counted if counted else 0.0
    return [round(size * (found or mean) * _UNIT) for size, found in told]


QUOTAS: dict[str, Callable[[Iterable[Tensor]], list[int] | None]] = {"size": by_size, "entropy": by_entropy}
