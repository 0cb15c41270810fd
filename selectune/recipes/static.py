"""Recipes that choose the support once, from weights, names, chance or the first step's gradient."""

from __future__ import annotations

from selectune import scores
from selectune.method import Method, Patterns, compose
from selectune.recipes.parameters import count, d3
from selectune.schedule import Budget, OneShot
from selectune.scope import BIASES, Scope
from selectune.select import GlobalTopK


def static_d3(
    budget: Budget,
    exp: float = 2.0,
    eps: float = 1.0,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
    batches: int = 1,
) -> Method:
    """static-D3: all B entries by the D3 score of the first step's gradient, then fixed.

    `batches` above 1: by the gradient summed over so many mini-batches before training instead.

    Source: Agarwal et al. (2025), static ablation, arXiv 2408.14470; the same score chosen once is
    GaLLoP (2025), arXiv 2510.19778.

    >>> import selectune as st
    >>> st.static_d3(budget=1000).schedule
    OneShot(budget=1000)
    """
    score = d3(exp, eps)
    if count("batches", batches) != 1:
        score = scores.d3_pooled(exp=float(exp), eps=float(eps), batches=batches)
    return compose("static-d3", score, OneShot(budget), scope, train_fully)


def pafi(budget: Budget, scope: Scope | Patterns = ("*",), train_fully: Patterns = (), tie: str = "order") -> Method:
    """PaFi: the B smallest |w| of the whole model, once. Reads the weights, no data.

    Source: Liao, Meng, Monz (2023), Parameter-Efficient Fine-Tuning without Introducing New Latency,
    arXiv 2305.16742.

    >>> import selectune as st
    >>> st.pafi(budget=0.005).schedule
    OneShot(budget=0.005)
    """
    return compose("pafi", scores.pafi(), OneShot(budget), scope, train_fully, GlobalTopK(tie))


def bitfit(train_fully: Patterns = (), scope: Scope | Patterns = (BIASES,)) -> Method:
    """BitFit: every bias vector; the budget is what they come to.

    A bias is a tensor whose last name component is `bias` or ends in `_bias`.
    Source: Ben Zaken, Goldberg, Ravfogel (2022), BitFit, arXiv 2106.10199.

    >>> import torch, selectune as st
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    >>> st.attach(model, st.bitfit()).selected
    6
    """
    return compose("bitfit", scores.constant(), OneShot(None), scope, train_fully)


def random(budget: Budget, scope: Scope | Patterns = ("*",), train_fully: Patterns = ()) -> Method:
    """Random mask: B entries uniformly over the scope, once; the seed is `attach`'s.

    This is the baseline that every other selection has to beat (R-Mask).

    >>> import selectune as st
    >>> st.random(budget=1000).score.name
    'random'
    """
    return compose("random", scores.random(), OneShot(budget), scope, train_fully)


def magnitude(
    budget: Budget, scope: Scope | Patterns = ("*",), train_fully: Patterns = (), tie: str = "order"
) -> Method:
    """Magnitude: the B largest |w| of the scope, once. Reads the weights, no data.

    It trains the weights that magnitude pruning would keep; the others keep their pretrained values.
    Source: Han, Pool, Tran, Dally (2015), arXiv 1506.02626, for the score; per layer it is the mask of
    Super-Tuning (2026), arXiv 2607.09287.

    >>> import selectune as st
    >>> st.magnitude(budget=0.005).score.name
    'magnitude'
    """
    return compose("magnitude", scores.magnitude(), OneShot(budget), scope, train_fully, GlobalTopK(tie))


def gallop(
    budget: Budget,
    eps: float = 1e-8,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """GaLLoP: the B entries with the largest |g| / |w|, the gradient of the first step, then fixed.

    This is static-D3 with exp=1. The paper's abstract says: largest task gradients and smallest pretrained
    magnitudes, chosen once. We infer that the two form a ratio, the value of eps, and that the gradient is the
    first step's.
    Source: Choudhary et al. (2025), GaLLoP, arXiv 2510.19778.

    >>> import selectune as st
    >>> st.gallop(budget=1000).score.parameters
    {'exp': 1.0, 'eps': 1e-08}
    """
    return compose("gallop", d3(1.0, eps), OneShot(budget), scope, train_fully)
