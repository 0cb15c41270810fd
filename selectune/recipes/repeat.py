"""Recipes that choose the whole support again at every selection."""

from __future__ import annotations

from selectune import scores
from selectune.method import Method, Patterns, compose
from selectune.recipes.parameters import count, d3
from selectune.schedule import Budget, Repeat
from selectune.scope import Scope
from selectune.select import PerTensor


def repeat_d3(
    budget: Budget,
    steps: int | None = None,
    exp: float = 2.0,
    eps: float = 1.0,
    every: int = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """repeat-D3: at every step train the B entries with the largest D3 score, chosen again each time.

    More than B entries differ from the base in the end, up to all: `tuner.touched` counts them and the
    delta stores them. Dropped entries keep their value and lose their optimizer state.
    Source: Agarwal et al. (2025), repeat-S, arXiv 2408.14470.

    >>> import selectune as st
    >>> st.repeat_d3(budget=1000, steps=50).schedule.keeps
    False
    """
    return compose("repeat-d3", d3(exp, eps), Repeat(budget, steps, every), scope, train_fully)


def repeat_random(
    budget: Budget,
    steps: int | None = None,
    every: int = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """Repeated random mask: at every step train B entries drawn uniformly over the scope, again each time.

    The control for repeat-D3: what choosing anew alone gives. Up to all entries differ from the base in the end.
    Source: ours, from the R-Mask baseline and the schedule of Agarwal et al. (2025), arXiv 2408.14470.

    >>> import selectune as st
    >>> st.repeat_random(budget=1000, steps=50).schedule.keeps
    False
    """
    return compose("repeat-random", scores.random(), Repeat(budget, steps, every), scope, train_fully)


def lift(
    budget: Budget = 0.05,
    steps: int | None = None,
    rank: int = 128,
    every: int = 200,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """LIFT: the largest entries of every matrix's approximation of rank `rank`, again every `every` steps.

    The budget is divided among tensors in proportion to size; the paper gives a matrix (m + n) times a LoRA rank, which
    is about 5 %, and takes linear layers only. Entries that stay keep their optimizer state, dropped entries keep their
    trained value and lose it. Each selection costs a singular value decomposition of every matrix in scope.
    Source: Liu et al. (2025), LIFT the Veil, arXiv 2506.00772; rank 128 and 200 steps: the released code.

    >>> import selectune as st
    >>> st.lift(steps=500).score.parameters["rank"]
    128
    """
    score = scores.lift(rank=count("rank", rank))
    return compose("lift", score, Repeat(budget, steps, every), scope, train_fully, PerTensor())


def fish_dip(
    budget: Budget = 0.01,
    steps: int | None = None,
    examples: int = 25,
    every: int = 100,
    pool: int | None = None,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """FISH-DIP: the B largest Fisher entries over the examples with the largest loss, again every `every` steps.

    Each selection computes the loss of the calibration examples (the first `pool` of them, if given) and sums
    Fisher scores over the `examples` hardest. `calibration` is read each time, so it is a list or a callable.
    Dropped entries keep their trained values, so more than B entries differ from the base in the end.
    A selection costs one forward pass without a graph for every example of the pool, one by one because `loss`
    gives no losses of single examples, and a forward and a backward pass for each of the hardest. With the whole
    training set as pool this may take longer than the steps in between; `pool` or `every` reduces it.
    The released code: 1 % of the weights, 100 steps, a tenth of the training set but 3 to 25 examples, dense
    optimizer state. Here new and returning entries start with fresh state, and scoring is in eval mode.
    Source: Das, Zhang, Shi, Yin, Zhang (2023), Unified Low-Resource Sequence Labeling by Sample-Aware Dynamic
    Sparse Finetuning, arXiv 2311.03748.

    >>> import selectune as st
    >>> st.fish_dip(steps=500).score.parameters["hardest"]
    25
    """
    score = scores.fisher(examples=count("pool", pool, none="all"), hardest=count("examples", examples))
    return compose("fish-dip", score, Repeat(budget, steps, every), scope, train_fully)
