"""Rows and columns of the trained entries, for optimizers that ask for them (`optim.contract.Placed`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from selectune.quantised import Quantised
from selectune.train.support.ledger import Ledger
from selectune.train.support.pages import Page


class LedgerPositions:
    """The positions of the entries (`optim.contract.Positions`), computed on request."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._pages = ledger, list(ledger.pages)

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns; one more of each for free slots."""
        forms = [matrix(t.form) for t in self._ledger.tensors]
        return 1 + sum(rows for rows, _ in forms), 1 + sum(columns for _, columns in forms)

    @property
    def rows(self) -> Tensor:
        return self._filled(lambda page, width: page.flat // width, 0)

    @property
    def columns(self) -> Tensor:
        return self._filled(lambda page, width: page.flat % width, 1)

    def _filled(self, place: Callable[[Page, int], Tensor], side: int) -> Tensor:
        ledger, start = self._ledger, 0
        found = ledger.free.new_full(ledger.offsets.shape, self.shape[side] - 1)
        for tensor, page in zip(ledger.tensors, self._pages, strict=True):
            form = matrix(tensor.form)
            found[page.slot] = start + place(page, form[1]).to(found)
            start += form[side]
        return found


def matrix(weight: Tensor | Quantised) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix: its first dimension by the others; a vector is one row."""
    rows = weight.shape[0] if weight.ndim > 1 else 1
    return rows, weight.numel() // max(1, rows)
