"""Structure: what is selected as one unit: an entry, or a row, column, block, head or subnet of a matrix.

A tensor is a matrix of its first dimension by all others, (n, 1) for a vector. The rows of a linear layer's weight are
its outputs and the columns its inputs, also where the module stores the transpose (transformers' Conv1D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from selectune.errors import ConfigError

UNITS = {
    "entry": "a single entry",
    "row": "a row: what one output is made from",
    "column": "a column: what one input is used for",
    "block": "a square block; those at the edges are smaller",
    "head-rows": "the rows that make one attention head",
    "head-columns": "the columns that read one attention head",
    "subnet": "some rows by some columns of a matrix, one such part of each",
}
BLOCK = 256  # the side of a block, unless said otherwise


class Shaped(Protocol):
    """What a structure asks of a tensor in scope."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of its matrix: outputs and inputs."""
        ...

    def matches(self, wanted: Sequence[str]) -> bool:
        """Whether one of its names fits one of the patterns."""
        ...


@dataclass(frozen=True)
class Structure:
    """What is selected as one unit, in all tensors or by pattern.

    The score of a unit is the mean (`pool="mean"`) or the sum of the scores of its entries; a score that reads nothing
    is drawn once for each unit. Whole units are taken, best first, until the budget is reached. It counts scalars, as
    everywhere, and is used exactly: the last unit of all (with a selection by tensor, of each) is trained in part, its
    first entries, if the rest of the budget does not hold it.

    `size`: the side of a block, by default 256, or how many rows a head has, by default as the model's config says.
    `also`: pairs of a pattern and another unit, for tensors that match it; the first that matches counts.

    >>> Structure("block", size=64)
    Structure(unit='block', size=64, pool='mean', also=())
    """

    unit: str = "entry"
    size: int | None = None
    pool: str = "mean"
    also: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "also", tuple((str(pattern), str(unit)) for pattern, unit in self.also))
        for unit in self.all_units:
            if unit not in UNITS:
                raise ConfigError(f"Unknown unit {unit!r}. Known: {', '.join(UNITS)}.")
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1):
            raise ConfigError(f"size= is the side of a block, or the rows of a head: at least 1, got {self.size!r}.")
        if self.pool not in ("mean", "sum"):
            raise ConfigError(f"Unknown pool {self.pool!r}. Known: mean, sum.")
        if "subnet" in self.all_units and len(set(self.all_units)) > 1:
            raise ConfigError("A subnet takes rows and columns of every tensor, so there is no other unit beside it.")

    @property
    def all_units(self) -> tuple[str, ...]:
        return (self.unit, *(unit for _, unit in self.also))

    @property
    def plain(self) -> bool:
        """Whether every unit is an entry."""
        return set(self.all_units) == {"entry"}

    def sized(self, model: Any) -> Structure:
        """The same structure with a size: 256 for a block, the head size of the model's config for a head."""
        if self.size is not None or not {"block", "head-rows", "head-columns"} & set(self.all_units):
            return self
        heads = any(unit.startswith("head") for unit in self.all_units)
        return replace(self, size=_head_size(model) if heads else BLOCK)

    def tile(self, tensor: Shaped) -> tuple[int, int]:
        """Rows and columns of a unit of this tensor."""
        rows, columns = tensor.shape
        unit = next((unit for pattern, unit in self.also if tensor.matches((pattern,))), self.unit)
        size = self.size or BLOCK
        return {
            "entry": (1, 1),
            "row": (1, columns),
            "column": (rows, 1),
            "block": (size, size),
            "head-rows": (size, columns),
            "head-columns": (rows, size),
        }[unit]


def pooled(matrix: Tensor, tile: tuple[int, int]) -> Tensor:
    """Sums (R, C) of a matrix (r, c) over tiles, in float64, for R = ceil(r / tile rows) and C likewise.

    >>> pooled(torch.ones(3, 4), (2, 4)).tolist()
    [[8.0], [4.0]]
    """
    (r, c), (a, b) = matrix.shape, tile
    rows, columns = math.ceil(r / a), math.ceil(c / b)
    whole = torch.nn.functional.pad(matrix.double(), (0, columns * b - c, 0, rows * a - r))
    return whole.view(rows, a, columns, b).sum((1, 3))


def spread(units: Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """A number for each unit (R, C), as a number for each entry (r, c).

    >>> spread(torch.tensor([[1], [2]]), (2, 4), (3, 2)).tolist()
    [[1, 1], [1, 1], [2, 2]]
    """
    rows = torch.arange(shape[0], device=units.device) // tile[0]
    columns = torch.arange(shape[1], device=units.device) // tile[1]
    return units[rows][:, columns]


def subnet(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions (count,) of the entries of a subnet of a matrix of scores (r, c): rows and columns.

    R rows by C columns, R / C as near to r / c as it goes, with R C <= count; the entries that are left over are the
    first of the next column. Rows and columns are those with the largest sums of scores: of the whole matrix, or the
    columns within the best rows, or the rows within the best columns, whichever has the largest sum inside.
    Source: Wang et al. (2025), LoSiA, arXiv 2507.04487, and its released code.
    """
    r, c = scores.shape
    most = max(1, math.ceil(count / c), min(r, count, round(math.sqrt(count * r / c))))
    high, wide = most, min(c, count // most)
    scores = scores.double()
    rows, columns = _largest(scores.sum(1))[:high], _largest(scores.sum(0))
    tries = (
        (rows, columns),
        (rows, _largest(scores[rows].sum(0))),
        (_largest(scores[:, columns[:wide]].sum(1))[:high], columns),
    )
    rows, columns = max(tries, key=lambda one: float(scores[one[0]][:, one[1][:wide]].sum()))
    left = count - high * wide
    rows = torch.sort(rows).values
    i = torch.cat((rows.repeat_interleave(wide), rows[:left]))
    j = torch.cat((columns[:wide].repeat(high), columns[wide : wide + 1].repeat(left)))
    return i, j


def _largest(sums: Tensor) -> Tensor:
    """Positions by falling sum, the lower first among equals."""
    return torch.argsort(sums, descending=True, stable=True)


def _head_size(model: Any) -> int:
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    text = config if of_text is None else of_text()
    for name in ("head_dim", "d_kv"):
        if isinstance(getattr(text, name, None), int):
            return int(getattr(text, name))
    width, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    if not isinstance(width, int) or not isinstance(heads, int) or not heads:
        raise ConfigError(
            f"The size of an attention head is not in the config of {type(model).__name__} (head_dim, or hidden_size "
            "and num_attention_heads). Give size=."
        )
    return width // heads
