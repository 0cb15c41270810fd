"""Scores read from data at fixed weights, before training or between its steps (`selectune.types.Reads`).

The engine computes the gradients for these functions, and itself uses the parameters named in `selectune.types.Score`.
"""

from __future__ import annotations

from torch import Tensor

from selectune.scores.gradient import d3
from selectune.types import score


@score(reads="examples")
def fisher(
    weight: Tensor,
    gradient: Tensor,
    examples: int | None = 1024,
    labels: str = "data",
    hardest: int | None = None,
) -> Tensor:
    """F = sum over single examples of g^2: the diagonal of the Fisher information.

    The engine calls this with the gradient of one example at a time and sums. With the data's labels it is
    the empirical Fisher, with labels="model" the true one (every class, weighted by its probability).
    `hardest`: only the n examples with the largest present loss. Reads: `examples` gradients at fixed
    weights, and uses one float per entry in scope for the sum.
    Source: Sung, Nair, Raffel (2021), FISH mask, arXiv 2111.09839, equation 3.

    >>> import torch, selectune as st
    >>> examples = [torch.tensor([1.0, -3.0, 0.5]), torch.tensor([1.0, 3.0, 0.5])]
    >>> sum(st.scores.fisher()(torch.zeros(3), g) for g in examples).tolist()
    [2.0, 18.0, 0.5]
    """
    del weight, examples, labels, hardest  # the engine uses these
    return gradient.square()


@score(reads="batches")
def fisher_batches(
    weight: Tensor,
    gradient: Tensor,
    batches: int | None = None,
    clip: float | None = 1.0,
    train_mode: bool = True,
) -> Tensor:
    """F = sum over mini-batches of g^2, each tensor's g scaled down to norm `clip` first: Child-Tuning-D's score.

    This is not the Fisher information of single examples: (mean g)^2 is not mean(g^2), so signs cancel within
    a batch. Dropout is on (`train_mode`). Reads: one gradient per mini-batch, for `batches` or all that
    calibration gives, and uses one float per entry in scope for the sum.
    Source: Xu et al. (2021), Child-Tuning, arXiv 2109.05687; clipping and training mode as in its released code.

    >>> import torch, selectune as st
    >>> batches = [torch.tensor([3.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 2.0])]
    >>> (sum(st.scores.fisher_batches(clip=None)(torch.zeros(3), g) for g in batches) / 2).tolist()
    [5.0, 0.0, 2.5]
    """
    del weight, batches, clip, train_mode  # the engine clips before it calls this
    return gradient.square()


@score(reads="batches")
def movement(weight: Tensor, gradient: Tensor, batches: int | None = 64) -> Tensor:
    """S = -sum over mini-batches of g w: positive where a descent step moves the weight away from 0.

    Movement Pruning learns this score; here no weight moves in the window, so it is the signed first-order
    change of the loss. Reads: one gradient per mini-batch; uses one float per entry in scope.
    Source: Sanh, Wolf, Rush (2020), Movement Pruning, arXiv 2005.07683.

    >>> import torch, selectune as st
    >>> s = st.scores.movement()(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-0.3, -0.1, 0.4]))
    >>> [round(x, 4) for x in s.tolist()]
    [0.3, -0.2, -0.2]
    """
    del batches
    return -(gradient * weight)


@score(reads="batches")
def sensitivity(weight: Tensor, gradient: Tensor, batches: int | None = 16) -> Tensor:
    """S = sum over mini-batches of |g w - (g w)^2 / 2|: what the loss changes by without the weight, to second order.

    The curvature is taken to be g^2. Reads: one gradient per mini-batch; uses one float per entry in scope.
    Source: Wang et al. (2025), LoSiA, arXiv 2507.04487, whose released code weighs a moving average of it by another
    of its deviations.

    >>> import torch, selectune as st
    >>> st.scores.sensitivity()(torch.tensor([2.0, 1.0]), torch.tensor([1.0, -1.0])).tolist()
    [0.0, 1.5]
    """
    del batches
    change = gradient * weight
    return (change - 0.5 * change.square()).abs()


@score(reads="pooled")
def snip(weight: Tensor, gradient: Tensor, batches: int | None = 1) -> Tensor:
    """S = |g w|, g the gradient summed over mini-batches: how much the loss changes without the weight.

    Reads: one gradient per mini-batch (the paper: one in all); uses one float per entry in scope. The paper
    divides by the sum of S, which does not change the order.
    Source: Lee, Ajanthan, Torr (2019), SNIP, arXiv 1810.02340.

    >>> import torch, selectune as st
    >>> s = st.scores.snip()(torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([1.0, 0.2, -0.1, 9.0]))
    >>> [round(x, 4) for x in s.tolist()]
    [0.5, 0.2, 0.2, 0.0]
    """
    del batches
    return (gradient * weight).abs()


@score(reads="pooled")
def d3_pooled(weight: Tensor, gradient: Tensor, exp: float = 2.0, eps: float = 1.0, batches: int | None = 32) -> Tensor:
    """H = |g| / (|w| + eps)^exp, g the gradient summed over mini-batches: D3 of more data than one batch.

    Reads: one gradient per mini-batch, at fixed weights; uses one float per entry in scope for the sum.
    Source: the score of Agarwal et al. (2025), arXiv 2408.14470, chosen once, as SPEFT (2024) does with |g|, arXiv
    2412.13488.

    >>> import torch, selectune as st
    >>> st.scores.d3_pooled(exp=1.0)(torch.tensor([0.0, 1.0]), torch.tensor([-3.0, 4.0])).tolist()
    [3.0, 2.0]
    """
    del batches
    return d3(exp=exp, eps=eps)(weight, gradient)


@score(reads="curvature")
def grasp(weight: Tensor, gradient: Tensor, batches: int | None = 1, temperature: float = 200.0) -> Tensor:
    """S = w (H g): the weights whose removal would reduce the gradient's norm most come first.

    `gradient` is the Hessian-gradient product H g. The paper's S(-w) = -w (H g) is high for weights to remove,
    so the sign is changed. `temperature` divides the logits (200 in the paper's code). Reads: three passes per
    mini-batch; uses two floats per entry in scope and the graph of a double backward pass.
    Source: Wang, Zhang, Grosse (2020), GraSP, arXiv 2002.07376.

    >>> import torch, selectune as st
    >>> w, hessian, g = torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 3.0])
    >>> st.scores.grasp()(w, hessian @ g).tolist()
    [2.0, -3.0]
    """
    del batches, temperature
    return weight * gradient


@score(reads="flow")
def synflow(weight: Tensor, gradient: Tensor) -> Tensor:
    """S = |w dR/dw|, R the sum of the outputs for an input of ones with absolute weights.

    It is the part of the flow through the network that passes the weight, and needs no data. Reads: one backward
    pass; uses one float per entry in scope, and one byte per weight of the model for the signs.
    Source: Tanaka, Kunin, Yamins, Ganguli (2020), SynFlow, arXiv 2006.05467; one round here, 100 in the paper.

    >>> import torch, selectune as st
    >>> st.scores.synflow()(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5])).tolist()
    [3.0, 1.0]
    """
    return (weight * gradient).abs()
