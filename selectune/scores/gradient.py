"""Scores that read the gradient of the present step."""

from __future__ import annotations

from torch import Tensor

from selectune.types import score


def _over_size(size: Tensor, exp: float, eps: float) -> Tensor:
    return (size + eps).pow(-exp)


@score(reads="gradient", above=0.0, fused="ratio", weighting=_over_size)
def d3(weight: Tensor, gradient: Tensor, exp: float = 2.0, eps: float = 1.0) -> Tensor:
    """H = |g| / (|w| + eps)^exp: large gradient on a small weight.

    exp 0 is |g|; exp < 0 prefers large weights. Entries without a gradient are never selected.
    Where the exponent is 0, 1 or 2, `ops.score_filter` computes the same bits in one pass with a cutoff.
    Reads: the weight and its gradient. Source: Agarwal et al. (2025), ID3, equation of D3.

    >>> import torch, selectune as st
    >>> w, g = torch.tensor([0.1, -2.0, 0.0, 0.5]), torch.tensor([0.4, -1.2, 0.1, -0.45])
    >>> [round(h, 4) for h in st.scores.d3(exp=2.0, eps=1.0)(w, g).tolist()]
    [0.3306, 0.1333, 0.1, 0.2]
    """
    if exp == 0.0:
        return gradient.abs()
    size = weight.abs().add_(eps)
    if exp == 1.0:
        return gradient.abs().div_(size)
    if exp == 2.0:
        return gradient.abs().div_(size.mul_(size))
    return gradient.abs().div_(size.pow_(exp))
