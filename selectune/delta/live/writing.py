"""Writing into a model, all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selectune import bits
from selectune.errors import DeltaStateError
from selectune.files.reading import some

TRIES = 3
"""How often a write is repeated that fails while the old values are put back."""


@dataclass(frozen=True, eq=False)
class Write:
    """New values for a tensor, or for some of its entries, and the values that they replace."""

    name: str
    tensor: Tensor
    indices: Tensor | None  # None: the whole tensor
    new: Tensor
    old: Tensor

    @property
    def now(self) -> Tensor:
        """The values that are there at present."""
        return self.tensor if self.indices is None else bits.gather(self.tensor, self.indices)

    def do(self, values: Tensor) -> None:
        """Put `values` there."""
        if self.indices is None:
            bits.overwrite(self.tensor, values)
        else:
            bits.scatter(self.tensor, self.indices, values)

    def reversed(self) -> Write:
        """The write that takes this one back."""
        return Write(self.name, self.tensor, self.indices, self.old, self.new)


def write_all(made: Sequence[Write], record: list[Any], after: Sequence[Any]) -> None:
    """Do all writes and make `record` hold `after`, or, if anything fails, leave both as they were.

    A write that fails while it is taken back is tried again, and the others are taken back in any case. Raises
    DeltaStateError, from the first error, if the old values of a tensor could not be put back.
    """
    begun: list[Write] = []
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
                f"writing failed, and so did putting back what was there, in {some(lost, ', ')}: the model is "
                f"neither what it was nor what it should be; load its weights again"
            ) from error
        raise


def _put_back(begun: Sequence[Write]) -> list[str]:
    lost = []
    for write in reversed(begun):
        for left in reversed(range(TRIES)):
            try:
                write.do(write.old)
                break
            except BaseException:  # noqa: BLE001  an interrupt too: half of a delta is worse than a late stop
                if not left and not bits.same_bits(write.now, write.old):
                    lost.append(f'"{write.name}"')
    return lost
