"""What an optimizer may ask of the engine: where its entries stand, which are new, what was seen of them.

Any torch optimizer works without asking. One that is an instance of these protocols is told:

    Placed      where the entries of the trained vector stand, before a step whose support changed
    Inheriting  which slots have new entries, before their first step; any other has its state set to 0 there
    Factored    gives the numbers that it holds for rows and columns to the scores that read them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


class Places(Protocol):
    """Where the entries of the trained vector stand: row and column in their tensors, seen as matrices.

    A matrix is the first dimension by the others, a vector one row. They are counted through; free slots have the last.
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
        """How many rows and columns there are."""
        ...


@runtime_checkable
class Placed(Protocol):
    """An optimizer that wants to know where its entries stand."""

    def place(self, values: Tensor, places: Places) -> None:
        """Called before the first step and before a step whose support changed."""
        ...


@dataclass(frozen=True)
class NewEntries:
    """Slots whose entries are new, and what was seen of their gradients before."""

    slots: Tensor  # (k,) int64
    mean: Tensor | None = None  # (k,) of the steps' gradients; None: they were not watched
    square: Tensor | None = None  # (k,) mean of their squares
    age: int = 0  # steps watched


@runtime_checkable
class Inheriting(Protocol):
    """An optimizer that knows what to make of new entries; any other has its elementwise state set to 0 there."""

    def inherit(self, values: Tensor, news: NewEntries) -> None:
        """Called before the step that is the first of these entries."""
        ...


@runtime_checkable
class Factored(Protocol):
    """An optimizer that holds one number for every row and every column."""

    def factors(self, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows (R,) and columns (C,) as `Places` counts them; None before the first step."""
        ...
