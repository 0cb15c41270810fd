"""Recipes without a support: whole tensors are trained."""

from __future__ import annotations

from selectune.method import Method, Patterns
from selectune.scope import Scope


def full(scope: Patterns = ("*",)) -> Method:
    """Full fine-tuning through the same door: every weight, dense gradients, dense optimizer state.

    >>> import selectune as st
    >>> st.full().scope.train_fully
    ('*',)
    """
    return Method(Scope(include=(), train_fully=scope), name="full")
