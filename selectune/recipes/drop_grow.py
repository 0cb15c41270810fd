"""Recipes that drop and grow: a support of constant size, drawn at random, drops its least moved entries for others.

The papers train linear layers only (SpIEL: all of a decoder's, without embeddings and head). Here the scope is every
tensor, as in the other recipes, and the budget is divided in proportion to size; `scope=` narrows it.
"""

from __future__ import annotations

from selectune import scores
from selectune.method import Method, Patterns, compose
from selectune.schedule import Budget, DropGrow
from selectune.scope import Scope
from selectune.select import PerTensor


def spiel_ag(
    budget: Budget,
    steps: int | None = None,
    every: int = 20,
    window: int = 5,
    fraction: float = 0.2,
    decay: str = "linear",
    until: float = 1.0,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """SpIEL-AG: drop the smallest |value - base|, grow the largest |sum of g over a window| among candidates.

    The candidates of a tensor are its entries with the largest |g| in the window's first backward pass, as many
    as it has selected; under accumulation that pass is only a part of the batch. Every tensor keeps its number
    of entries. Grown entries start at the base. `SparseAdamW(age="entry")` starts them with the window's mean
    gradient and mean square; other optimizers start them from 0. Under accumulation the means are over steps
    (in the released code over backward passes, which are smaller). Reads one dense gradient per window.
    Source: Ansell et al. (2024), Scaling Sparse Fine-Tuning to Large Language Models, arXiv 2401.16405.

    >>> import selectune as st
    >>> s = st.spiel_ag(budget=1000, steps=100).schedule
    >>> [c for c in range(100) if s.due(c)]
    [5, 25, 45, 65, 85]
    """
    schedule = DropGrow(budget, steps, every, window, fraction, decay, until)
    return compose("spiel-ag", scores.d3(exp=0.0), schedule, scope, train_fully, PerTensor())


def spiel_ma(
    budget: Budget,
    steps: int | None = None,
    every: int = 20,
    window: int = 5,
    fraction: float = 0.2,
    decay: str = "linear",
    until: float = 1.0,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """SpIEL-MA: drop the smallest |value - base|, grow the largest r_i c_j of SM3's accumulators.

    Needs `SparseSM3`, which has these. No dense gradient is formed; a dropped entry does not grow at once.
    Entries are dropped at the same steps as in SpIEL-AG; `window` only shifts these steps here.
    Source: Ansell et al. (2024), Scaling Sparse Fine-Tuning to Large Language Models, arXiv 2401.16405.

    >>> import selectune as st
    >>> st.spiel_ma(budget=1000, steps=100).score.name
    'row_times_column'
    """
    schedule = DropGrow(budget, steps, every, window, fraction, decay, until, regrow=False)
    return compose("spiel-ma", scores.row_times_column(), schedule, scope, train_fully, PerTensor())


def rigl(
    budget: Budget,
    steps: int | None = None,
    every: int = 100,
    fraction: float = 0.3,
    decay: str = "cosine",
    until: float = 0.75,
    drop: str = "change",
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """RigL on deltas: drop the smallest |value - base|, grow the largest |g| of the step, which trains them at once.

    `drop="weight"` drops the smallest |value|, as in the paper, which trains from scratch. Reads one dense gradient
    every `every` steps, and none after the share `until` of all steps.
    Source: Evci, Gale, Menick, Castro, Elsen (2020), Rigging the Lottery, arXiv 1911.11134.

    >>> import selectune as st
    >>> s = st.rigl(budget=1000, steps=400).schedule
    >>> [c for c in range(400) if s.due(c)]
    [100, 200]
    """
    schedule = DropGrow(budget, steps, every, 0, fraction, decay, until, drop)
    return compose("rigl", scores.d3(exp=0.0), schedule, scope, train_fully, PerTensor())


def sparse_evolution(
    budget: Budget,
    steps: int | None = None,
    every: int = 100,
    fraction: float = 0.3,
    decay: str = "constant",
    until: float = 0.75,
    drop: str = "change",
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """SET on deltas: drop the smallest |value - base|, grow as many at random; the seed is `attach`'s.

    `drop="weight"` drops the smallest |value|, as in the paper. Reads no gradient.
    Source: Mocanu et al. (2018), Sparse Evolutionary Training, arXiv 1707.04780.

    >>> import selectune as st
    >>> st.sparse_evolution(budget=1000, steps=400).name
    'set'
    """
    schedule = DropGrow(budget, steps, every, 0, fraction, decay, until, drop)
    return compose("set", scores.random(), schedule, scope, train_fully, PerTensor())
