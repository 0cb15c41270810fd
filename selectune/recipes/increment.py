"""Recipes that select the budget step by step: the support grows, and nothing is dropped."""

from __future__ import annotations

from selectune import scores
from selectune.method import Method, Patterns, compose
from selectune.recipes.parameters import d3, early
from selectune.schedule import Budget, Increment
from selectune.scope import Scope


def id3(
    budget: Budget,
    steps: int | None = None,
    exp: float = 2.0,
    eps: float = 1.0,
    every: int = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
    spread: str = "cumulative",
    until: float = 1.0,
) -> Method:
    """ID3: at every step unmask the B/T entries with the largest |g| / (|w| + eps)^exp.

    `steps` is the number of optimizer steps of the run, T. `every=k` selects k quotas at every k-th
    step; the steps between cost no dense gradient. `until`: the share of the steps after which the whole
    budget is selected; where the learning rate decays to 0, entries of the last steps hardly learn.
    Reads the gradient of the selecting steps.
    Source: Agarwal, Ramesh, Sengupta, Chakraborty (2025), Step-by-Step Unmasking, arXiv 2408.14470.

    >>> import selectune as st
    >>> st.id3(budget=0.001, steps=500, exp=1.0).score.parameters
    {'exp': 1.0, 'eps': 1.0}
    """
    return compose("id3", d3(exp, eps), Increment(budget, early(steps, until), every, spread), scope, train_fully)


def increment_pafi(
    budget: Budget,
    steps: int | None = None,
    every: int = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """Incremental PaFi: at every step unmask the B/T smallest |w|. Needs no dense gradient at all.

    Source: Agarwal et al. (2025), ablation of the schedule, arXiv 2408.14470.

    >>> import selectune as st
    >>> st.increment_pafi(budget=1000, steps=50).score.name
    'pafi'
    """
    return compose("increment-pafi", scores.pafi(), Increment(budget, steps, every), scope, train_fully)


def increment_random(
    budget: Budget,
    steps: int | None = None,
    every: int = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """Incremental random mask: at every step unmask B/T entries uniformly over the rest of the scope.

    The control for ID3: what the schedule alone gives. In the end the support is that of `random` with the same
    seed. Needs no dense gradient at all.
    Source: ours, from the R-Mask baseline and the schedule of Agarwal et al. (2025), arXiv 2408.14470.

    >>> import selectune as st
    >>> st.increment_random(budget=1000, steps=50).schedule.target(0)
    20
    """
    return compose("increment-random", scores.random(), Increment(budget, steps, every), scope, train_fully)
