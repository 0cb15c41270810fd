"""Scores that read weights, or nothing: one pass, no data, before training."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from selectune.types import score


@score(reads="weight", fused="small")
def pafi(weight: Tensor) -> Tensor:
    """H = -|w|: the smallest weights first.

    Reads: weights, one pass. Source: Liao, Meng, Monz (2023), PaFi, arXiv 2305.16742.

    >>> import torch, selectune as st
    >>> st.scores.pafi()(torch.tensor([0.3, -0.1, 0.2, -0.4])).argsort(descending=True).tolist()
    [1, 2, 0, 3]
    """
    return -weight.abs()


@score(reads="weight")
def magnitude(weight: Tensor) -> Tensor:
    """H = |w|: the largest weights first. Reads: weights, one pass.

    >>> import torch, selectune as st
    >>> st.scores.magnitude()(torch.tensor([0.3, -0.4])).argmax().item()
    1
    """
    return weight.abs()


@score(reads="matrix")
def lift(weight: Tensor, rank: int = 128) -> Tensor:
    """H = |W_r|: the largest entries of the best approximation of rank r to the weight W, by its singular values.

    A tensor of more dimensions is a matrix of its first dimension; a vector has rank 1 and is itself.
    Reads: weights, a singular value decomposition of each. Source: Liu et al. (2025), LIFT, arXiv 2506.00772.

    >>> import torch, selectune as st
    >>> st.scores.lift(rank=1)(torch.tensor([[3.0, 0.0], [0.0, 2.0]])).round(decimals=4).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    matrix = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight.reshape(1, -1)
    if rank >= min(matrix.shape):
        return weight.abs()
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return ((left[:, :rank] * sizes[:rank]) @ right[:rank]).abs().view(weight.shape)


@score(reads="nothing")
def random(weight: Tensor, generator: Generator) -> Tensor:
    """H ~ U(0, 1), independent of the weight (R-Mask): B entries uniformly, without replacement.

    float64, so that ties do not favour early entries. Drawn on the CPU, so a seed gives one support
    on every device. Reads: nothing.

    >>> import torch, selectune as st
    >>> draw = lambda: st.scores.random()(torch.zeros(3), generator=torch.Generator().manual_seed(1))
    >>> bool((draw() == draw()).all())
    True
    """
    return torch.rand(weight.shape, dtype=torch.float64, generator=generator).to(weight.device)


@score(reads="nothing")
def constant(weight: Tensor, generator: Generator) -> Tensor:
    """H = 0 for every entry: the whole scope, or its first B entries in order. Reads: nothing.

    >>> import torch, selectune as st
    >>> st.scores.constant()(torch.tensor([0.3, -0.4])).tolist()
    [0.0, 0.0]
    """
    del generator
    return torch.zeros_like(weight)
