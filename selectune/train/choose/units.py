"""Selects whole units: rows, columns, blocks, heads or subnets in place of single entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selectune.scope import ScopedTensor
from selectune.structure import Structure, pooled, spread, subnet
from selectune.train.choose.scan import barred_entries
from selectune.types import Reads, Score


def rank_units(
    structure: Structure,
    score: Score,
    tensors: Sequence[ScopedTensor],
    scored: Callable[[ScopedTensor], Tensor],
    generator: torch.Generator,
    quota: int,
    counts: Sequence[int] | None,
) -> tuple[Tensor, Tensor, list[str]]:
    """The entries of the best units, best unit first: tensors (k,), flat indices (k,), and tensors without a score.

    `scored` gives the scores of all entries of a tensor, in its shape. `counts`: how many entries each tensor gets;
    None: `quota` of all together. One tensor's scores are in memory at a time.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []  # scores of units, tensors, flat indices: one row per entry
    broken: list[str] = []
    for tensor in tensors:
        count = quota if counts is None else counts[tensor.index]
        if count == 0 or tensor.form.numel() == 0:
            continue
        if "subnet" in structure.all_units:
            scores, flat = _of_a_subnet(score, tensor, scored, generator, count)
        else:
            scores, flat = _of_tiles(structure, score, tensor, scored, generator, count)
        if not bool(torch.isfinite(scores).all()):
            broken.append(tensor.name)
            continue
        kept.append((scores, torch.full_like(flat, tensor.index), flat))
    if not kept:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), broken
    scores, where, flat = (torch.cat([part.cpu() for part in parts]) for parts in zip(*kept, strict=True))
    order = torch.argsort(scores, descending=True, stable=True)[:quota]
    return where[order], flat[order], broken


def _of_tiles(
    structure: Structure,
    score: Score,
    tensor: ScopedTensor,
    scored: Callable[[ScopedTensor], Tensor],
    generator: torch.Generator,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Of the best units: the unit's score for each entry (k,), and flat indices (k,), at most `count`."""
    tile = structure.tile(tensor)
    allowed = _free(tensor)
    free = tensor.matrix(allowed)
    size = pooled(free, tile)
    if score.reads is Reads.NOTHING:
        units = score(torch.zeros(size.numel()), None, generator).to(size).view(size.shape)
    else:
        units = pooled(tensor.matrix(scored(tensor)) * free, tile)
        units = units / size.clamp(min=1) if structure.pool == "mean" else units
    if not bool(torch.isfinite(units).all()):
        return units.reshape(-1), units.reshape(-1)
    flat_units = units.reshape(-1)
    eligible = size.reshape(-1) > 0
    if score.above is not None:
        eligible &= flat_units > score.above
    order = torch.argsort(torch.where(eligible, flat_units, -torch.inf), descending=True, stable=True)
    order = order[: int(eligible.sum())]
    reached = torch.cumsum(size.reshape(-1)[order], 0)
    order = order[: int((reached < count).sum()) + 1]
    place = torch.full_like(flat_units, -1, dtype=torch.int64)
    place[order] = torch.arange(order.numel(), device=order.device)
    of_entry = tensor.stored(spread(place.view(units.shape), tile, tensor.shape)).reshape(-1)
    flat = ((of_entry >= 0) & allowed.reshape(-1)).nonzero()[:, 0]
    flat = flat[torch.argsort(of_entry[flat], stable=True)][:count]
    return flat_units[order[of_entry[flat]]], flat


def _of_a_subnet(
    score: Score,
    tensor: ScopedTensor,
    scored: Callable[[ScopedTensor], Tensor],
    generator: torch.Generator,
    count: int,
) -> tuple[Tensor, Tensor]:
    """The mean score of a subnet's rows and columns for each entry (k,), and flat indices (k,)."""
    matrix = tensor.matrix(scored(tensor)).double()
    if not bool(torch.isfinite(matrix).all()):
        return matrix.reshape(-1), matrix.reshape(-1)
    free = tensor.matrix(_free(tensor))
    rows, columns = (free.any(1 - side).nonzero()[:, 0] for side in (0, 1))  # without a padding row
    i, j = subnet(matrix[rows][:, columns], count)
    numbers = tensor.matrix(torch.arange(matrix.numel(), device=matrix.device).view(tensor.form.shape))
    flat = numbers[rows[i], columns[j]]
    return torch.full(flat.shape, float(matrix[rows[i], columns[j]].mean()), dtype=torch.float64), flat


def _free(tensor: ScopedTensor) -> Tensor:
    """Whether an entry may be selected, in the tensor's shape."""
    form = tensor.form  # its numbers are not read: a quantised or sharded weight would make all of them
    free = torch.ones(form.numel(), dtype=torch.bool, device=form.device)
    free[barred_entries(tensor, None)] = False
    return free.view(form.shape)
