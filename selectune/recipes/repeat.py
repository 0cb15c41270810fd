"""Recipes that choose the support afresh at every selection."""

from __future__ import annotations

from selectune import scores
from selectune.method import Method, Patterns, compose
from selectune.recipes.parameters import count, d3
from selectune.schedule import Budget, Repeat
from selectune.scope import Scope


def repeat_d3(
    budget: Budget,
    steps: int | None = None,
    exp: float = 2.0,
    eps: float = 1.0,
    every: int = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """repeat-D3: at every step train the B entries with the largest D3 score, chosen afresh.

    More than B entries differ from the base in the end, up to all: `tuner.touched` counts them and the
    delta stores them. Dropped entries keep their value and lose their optimizer state.
    Source: Agarwal et al. (2025), repeat-S, arXiv 2408.14470.

    >>> import selectune as st
    >>> st.repeat_d3(budget=1000, steps=50).schedule.keeps
    False
    """
    return compose("repeat-d3", d3(exp, eps), Repeat(budget, steps, every), scope, train_fully)


def fish_dip(
    budget: Budget = 0.01,
    steps: int | None = None,
    examples: int = 25,
    every: int = 100,
    pool: int | None = None,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """FISH-DIP: the B largest Fisher entries over the examples with the largest loss, afresh every `every` steps.

    Each time the loss of every calibration example (at most `pool` of them, the first) is taken, and the
    Fisher scores are summed over the `examples` hardest. `calibration` is read again and again, so it is a list
    or a callable. Dropped entries keep their trained value, so more than B differ from the base in the end.
    Costs, each time, a forward pass without a graph for every example of the pool, one by one, since `loss` gives
    the loss of a batch and not of its examples, and a second forward and a backward pass for the hardest alone. With
    the whole training set as pool the forwards may take longer than the steps in between: `pool` or `every` lowers it.
    The released code: 1 % of the weights, 100 steps, a tenth of the training set but 3 to 25 examples, optimizer
    state that stays dense; here entries that come or come back start with fresh state, and scoring is in eval mode.
    Source: Das, Zhang, Shi, Yin, Zhang (2023), Unified Low-Resource Sequence Labeling by Sample-Aware Dynamic
    Sparse Finetuning, arXiv 2311.03748.

    >>> import selectune as st
    >>> st.fish_dip(steps=500).score.parameters["hardest"]
    25
    """
    score = scores.fisher(examples=count("pool", pool, optional=True), hardest=count("examples", examples))
    return compose("fish-dip", score, Repeat(budget, steps, every), scope, train_fully)
