"""Recipes without a support: whole tensors are trained."""

from __future__ import annotations

from selectune.method import Method, Patterns
from selectune.phases import Weights
from selectune.scope import CROSS_ATTENTION, Scope


def full(scope: Scope | Patterns = ("*",)) -> Method:
    """Full fine-tuning in the same interface: every weight, dense gradients, dense optimizer state.

    A Scope's `include` and `train_fully` tensors are trained, except those that it excludes.

    >>> import selectune as st
    >>> st.full().scope.train_fully
    ('*',)
    """
    return Method(_train_whole(scope), name="full")


def xattn(scope: Scope | Patterns = (CROSS_ATTENTION,)) -> Method:
    """Xattn: whole tensors of the decoder's cross-attention: query, key, value, output, their biases and layer norm.

    For encoder-decoder models; others raise a ScopeError. There is no score, and optimizer state is dense
    for these tensors. The paper moves to a new language and also trains the new embeddings; for that, add
    their pattern to `scope`.
    Source: Gheini, Ren, May (2021), Cross-Attention is All You Need, arXiv 2104.08771.

    >>> import selectune as st
    >>> st.xattn().scope.train_fully
    ('@cross_attention',)
    """
    return Method(_train_whole(scope), name="xattn")


def child_tuning_f(p: float = 0.3, scope: Scope | Patterns = ("*",)) -> Method:
    """Child-Tuning-F: train everything; every step uses a random share p of the gradient's entries, divided by p.

    The mean of the masked gradient is the gradient. It has no budget: it regularises dense training. The mask
    is drawn after clipping. The source uses p from 0.2 to 0.4. Costs what full fine-tuning does, and a copy of
    the base. Source: Xu et al. (2021), Raise a Child in Large Language Model, arXiv 2109.05687.

    >>> import selectune as st
    >>> st.child_tuning_f(p=0.25).dense
    Weights(l1=0.0, p=0.25, lr=None)
    """
    return Method(scope if isinstance(scope, Scope) else Scope(scope), name="child-tuning-f", dense=Weights(p=p))


def _train_whole(scope: Scope | Patterns) -> Scope:
    if not isinstance(scope, Scope):
        return Scope(include=(), train_fully=scope)
    return Scope(include=(), exclude=scope.exclude, train_fully=(*scope.include, *scope.train_fully))
