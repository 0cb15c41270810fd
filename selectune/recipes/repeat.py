"""Recipes that choose the support afresh at every selection."""

from __future__ import annotations

from selectune.method import Method, Patterns, compose
from selectune.recipes.parameters import d3
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
