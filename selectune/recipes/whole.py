"""Recipes without a support: whole tensors are trained."""

from __future__ import annotations

from selectune.method import Method, Patterns
from selectune.phases import Weights
from selectune.scope import CROSS_ATTENTION, Scope


def full(scope: Scope | Patterns = ("*",)) -> Method:
    """Full fine-tuning through the same door: every weight, dense gradients, dense optimizer state.

    Of a Scope, what it includes is trained, and what it trains wholly; `exclude` takes out of both.

    >>> import selectune as st
    >>> st.full().scope.train_fully
    ('*',)
    """
    return Method(_wholly(scope), name="full")


def xattn(scope: Scope | Patterns = (CROSS_ATTENTION,)) -> Method:
    """Xattn: the decoder's cross-attention blocks wholly: query, key, value, output, their biases and layer norm.

    For encoder-decoder models; one without cross-attention is refused with a ScopeError. No score, dense
    optimizer state for these tensors. The paper, which moves to a new language, also trains the new
    embeddings: add their pattern to `scope` for that.
    Source: Gheini, Ren, May (2021), Cross-Attention is All You Need, arXiv 2104.08771.

    >>> import selectune as st
    >>> st.xattn().scope.train_fully
    ('@cross_attention',)
    """
    return Method(_wholly(scope), name="xattn")


def child_tuning_f(p: float = 0.3, scope: Scope | Patterns = ("*",)) -> Method:
    """Child-Tuning-F: train everything, at every step by a fresh random share p of the gradient, divided by p.

    The mean of the masked gradient is the gradient; no budget: a regulariser of dense training. The mask
    is drawn after clipping. The source uses p of 0.2 to 0.4. Costs what full fine-tuning does, and a copy of
    the base. Source: Xu et al. (2021), Raise a Child in Large Language Model, arXiv 2109.05687.

    >>> import selectune as st
    >>> st.child_tuning_f(p=0.25).dense
    Weights(l1=0.0, p=0.25, lr=None)
    """
    return Method(scope if isinstance(scope, Scope) else Scope(scope), name="child-tuning-f", dense=Weights(p=p))


def _wholly(scope: Scope | Patterns) -> Scope:
    if not isinstance(scope, Scope):
        return Scope(include=(), train_fully=scope)
    return Scope(include=(), exclude=scope.exclude, train_fully=(*scope.include, *scope.train_fully))
