"""Scores that read the change that a dense phase made."""

from __future__ import annotations

from torch import Tensor

from selectune.types import score


@score(reads="change")
def change(weight: Tensor, change: Tensor) -> Tensor:
    """H = |theta_1 - theta_0|: how far dense training moved an entry.

    Reads: the change of every entry, once, when a dense phase ends. Source: Ansell, Ponti, Korhonen,
    Vulic (2022), LT-SFT, arXiv 2110.07560; |z w| of Guo, Rush, Kim (2021), arXiv 2012.07463.

    >>> import torch, selectune as st
    >>> st.scores.change()(torch.ones(3), torch.tensor([0.5, -0.75, 0.0])).tolist()
    [0.5, 0.75, 0.0]
    """
    del weight
    return change.abs()
