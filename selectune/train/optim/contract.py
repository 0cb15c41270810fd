"""Three protocols by which an optimizer opts in to extra information. Any torch optimizer works without them.

Placed      gets the positions of the trained entries, before a step whose support changed
Inheriting  gets new entries before their first step; other optimizers have their state set to 0 there
Factored    gives its numbers for rows and columns to the scores that read them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


class Positions(Protocol):
    """The row and the column of every trained entry.

    A tensor counts as a matrix of its first dimension by the others, a vector as one row. Rows and columns are
    numbered through all tensors; free slots have the last number.
    """

    @property
    def rows(self) -> Tensor:
        """(B,) int64."""
        ...

    @property
    def columns(self) -> Tensor:
        """(B,) int64."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns."""
        ...


@runtime_checkable
class Placed(Protocol):
    """An optimizer that needs the positions of its entries."""

    def place(self, values: Tensor, positions: Positions) -> None:
        """Called before the first step and before a step whose support changed."""
        ...


@dataclass(frozen=True)
class NewEntries:
    """Slots with new entries, and statistics of their gradients if these were watched before."""

    slots: Tensor  # (k,) int64
    mean: Tensor | None = None  # (k,) mean of their gradients over steps; None if they were not watched
    square: Tensor | None = None  # (k,) mean of the squares
    age: int = 0  # how many steps were watched


@runtime_checkable
class Inheriting(Protocol):
    """An optimizer that makes its own state for new entries."""

    def inherit(self, values: Tensor, new: NewEntries) -> None:
        """Called before the first step of these entries."""
        ...


@runtime_checkable
class Factored(Protocol):
    """An optimizer that holds one number for every row and every column."""

    def factors(self, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """The numbers of rows (R,) and columns (C,), as `Positions` counts them; None before the first step."""
        ...
