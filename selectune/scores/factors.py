"""Scores that read the optimizer's numbers for rows and columns."""

from __future__ import annotations

from torch import Tensor

from selectune.types import score


@score(reads="factors", above=0.0)
def row_times_column(row: Tensor, column: Tensor) -> Tensor:
    """H = r_i c_j: high if both the row and the column had large gradients.

    Reads: SM3's accumulators, the largest sums of g^2 of a row and of a column; no gradient. Entries of a row or
    column without any entry ever selected score 0 and are never taken.
    Source: Ansell et al. (2024), SpIEL-MA, arXiv 2401.16405.

    >>> import torch, selectune as st
    >>> st.scores.row_times_column()(torch.tensor([4.0, 1.0, 1.0]), torch.tensor([9.0, 1.0, 9.0])).tolist()
    [36.0, 1.0, 9.0]
    """
    return row * column
