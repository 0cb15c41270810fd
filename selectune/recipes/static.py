"""Recipes that choose the support once, before or at the first step."""

from __future__ import annotations

from selectune import scores
from selectune.errors import ConfigError
from selectune.method import Method, Patterns, compose
from selectune.recipes.parameters import d3
from selectune.schedule import Budget, OneShot
from selectune.scope import BIASES, Scope
from selectune.select import GlobalTopK


def static_d3(
    budget: Budget,
    exp: float = 2.0,
    eps: float = 1.0,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """static-D3: all B entries by the D3 score of the first step's gradient, then fixed.

    Source: Agarwal et al. (2025), static ablation, arXiv 2408.14470; the same score chosen once is
    GaLLoP (2025), arXiv 2510.19778.

    >>> import selectune as st
    >>> st.static_d3(budget=1000).schedule
    OneShot(budget=1000)
    """
    return compose("static-d3", d3(exp, eps), OneShot(budget), scope, train_fully)


def pafi(budget: Budget, scope: Scope | Patterns = ("*",), train_fully: Patterns = (), tie: str = "order") -> Method:
    """PaFi: the B smallest |w| of the whole model, once. Reads the weights, no data.

    Source: Liao, Meng, Monz (2023), Parameter-Efficient Fine-Tuning without Introducing New Latency,
    arXiv 2305.16742.

    >>> import selectune as st
    >>> st.pafi(budget=0.005).schedule
    OneShot(budget=0.005)
    """
    return compose("pafi", scores.pafi(), OneShot(budget), scope, train_fully, GlobalTopK(tie))


def fish(
    budget: Budget,
    examples: int = 1024,
    labels: str = "data",
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """FISH mask: the B entries with the largest Fisher information over single examples, once.

    labels="data": the loss's own labels, one backward pass an example (empirical Fisher).
    labels="model": every class weighted by its probability, one backward pass a class (true Fisher).
    Source: Sung, Nair, Raffel (2021), Training Neural Networks with Fixed Sparse Masks, arXiv 2111.09839.

    >>> import selectune as st
    >>> st.fish(budget=1000, examples=64).score.parameters
    {'examples': 64, 'labels': 'data'}
    """
    if labels not in ("data", "model"):
        raise ConfigError(f"Unknown labels '{labels}'. Known: data, model.")
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ConfigError(f"examples= must be an int of at least 1, got {examples!r}.")
    score = scores.fisher(examples=examples, labels=labels)
    return compose("fish", score, OneShot(budget), scope, train_fully)


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

    The baseline that every other selection has to beat (R-Mask).

    >>> import selectune as st
    >>> st.random(budget=1000).score.name
    'random'
    """
    return compose("random", scores.random(), OneShot(budget), scope, train_fully)
