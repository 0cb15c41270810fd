"""Scores that read the gradient of the step being taken, or of single examples before training."""

from __future__ import annotations

from torch import Tensor

from selectune.types import score


@score(reads="gradient", above=0.0, fused=True)
def d3(weight: Tensor, gradient: Tensor, exp: float = 2.0, eps: float = 1.0) -> Tensor:
    """H = |g| / (|w| + eps)^exp: large gradient on a small weight.

    exp 0 is |g|; exp < 0 prefers large weights. Entries without gradient are never selected.
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


@score(reads="examples")
def fisher(weight: Tensor, gradient: Tensor, examples: int = 1024, labels: str = "data") -> Tensor:
    """F = sum over single examples of g^2: the diagonal of the Fisher information.

    The engine calls this with the gradient of one example at a time and sums. With labels drawn from
    the data it is the empirical Fisher, with labels="model" the true one (every class, weighted by its
    probability). Reads: `examples` gradients before training; one float per entry in scope meanwhile.
    Source: Sung, Nair, Raffel (2021), FISH mask, arXiv 2111.09839, equation 3.

    >>> import torch, selectune as st
    >>> examples = [torch.tensor([1.0, -3.0, 0.5]), torch.tensor([1.0, 3.0, 0.5])]
    >>> sum(st.scores.fisher()(torch.zeros(3), g) for g in examples).tolist()
    [2.0, 18.0, 0.5]
    """
    del weight, examples, labels  # the engine reads how many examples, and whose labels
    return gradient.square()
