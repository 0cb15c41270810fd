"""Writing into a model, all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from selectune import bits
from selectune.errors import DeltaStateError

SHOWN = 5
"""How many offending tensors a message names."""

TRIES = 3
"""How often a write is repeated that fails while what was there before is put back."""


class Writing(Protocol):
    """A write: `do(new)` makes it and `do(old)` takes it back."""

    @property
    def name(self) -> str: ...
    @property
    def new(self) -> Tensor: ...
    @property
    def old(self) -> Tensor: ...
    def do(self, values: Tensor) -> None: ...
    def holds(self, values: Tensor) -> bool: ...


@dataclass(frozen=True, eq=False)
class Write:
    """One write: where, what, and what was there before."""

    name: str
    tensor: Tensor
    indices: Tensor | None  # None: the whole tensor
    new: Tensor
    old: Tensor

    def do(self, values: Tensor) -> None:
        """Put `values` there."""
        if self.indices is None:
            bits.overwrite(self.tensor, values)
        else:
            bits.scatter(self.tensor, self.indices, values)

    def holds(self, values: Tensor) -> bool:
        """Whether `values` are there."""
        return bits.same_bits(self.tensor if self.indices is None else bits.gather(self.tensor, self.indices), values)


def write_all(made: Sequence[Writing], record: list[Any], after: Sequence[Any]) -> None:
    """Do all writes and make `record` hold `after`, or, if anything fails, leave both as they were.

    A write that fails while it is put back is tried again, and the others are put back whatever becomes of it. Raises
    DeltaStateError, from the first error, if a tensor could not be put back.
    """
    begun: list[Writing] = []
    before = list(record)
    try:
        for write in made:
            begun.append(write)
            write.do(write.new)
        record[:] = after
    except BaseException as error:
        record[:] = before
        lost = _put_back(begun)
        if lost:
            raise DeltaStateError(
                f"writing failed, and so did putting back what was there, in {', '.join(lost[:SHOWN])}: the model is "
                f"neither what it was nor what it should be; load its weights again"
            ) from error
        raise


def _put_back(begun: Sequence[Writing]) -> list[str]:
    lost = []
    for write in reversed(begun):
        for left in reversed(range(TRIES)):
            try:
                write.do(write.old)
                break
            except BaseException:  # noqa: BLE001  an interrupt too: half of a delta is worse than a late stop
                if not left and not write.holds(write.old):
                    lost.append(f'"{write.name}"')
    return lost
