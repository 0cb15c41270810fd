"""Recipes that select by how dense training changed the weights, and train the selected entries from the base again."""

from __future__ import annotations

from selectune import scores
from selectune.method import Method, Patterns, compose
from selectune.phases import Gates, Weights
from selectune.schedule import Budget, Rounds
from selectune.scope import Scope


def lt_sft(
    budget: Budget,
    steps: int | None = None,
    dense: int | float = 3 / 13,
    rounds: int = 1,
    l1: float = 0.0,
    dense_lr: float | None = None,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """LT-SFT: train everything, keep the B entries with the largest |theta_1 - theta_0|, rewind, train those.

    `dense`: the dense share of the steps, or their number in a round; 3 of 13 epochs by default. `rounds`:
    each adds B / rounds of the entries that are still frozen and rewinds to its own start. `l1`: dense steps
    add the gradient of l1 * sum |theta - theta_0| / N. `train_fully` tensors are rewound too. One
    learning-rate schedule covers both phases; the optimizer's state is reset at the switch.
    Costs, in dense steps, a copy of the base, dense gradients and dense optimizer state; then O(B).
    Source: Ansell, Ponti, Korhonen, Vulic (2022), Composable Sparse Fine-Tuning, arXiv 2110.07560.

    >>> import selectune as st
    >>> st.lt_sft(budget=0.01, steps=130).schedule
    Rounds(budget=0.01, steps=130, share=0.23076923076923078, rounds=1)
    """
    schedule = Rounds(budget, steps, dense, rounds)
    return compose("lt-sft", scores.change(), schedule, scope, train_fully, dense=Weights(l1=l1, lr=dense_lr))


def diff_pruning(
    budget: Budget,
    steps: int | None = None,
    dense: int | float = 0.5,
    penalty: float = 1.25e-7,
    structured: bool = True,
    group_penalty: str = "product",
    start_from: str = "base",
    dense_lr: float | None = None,
    gate_lr: float = 0.1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """Diff pruning: train theta_0 + z w behind hard-concrete gates, keep the B largest |z w|, train those.

    Half of the steps are dense by default. `penalty` lowers the expected number of open gates; it is added to
    the gates' gradient, so the loss is unchanged. `structured`: every tensor has one more gate, with
    `group_penalty` "product" or "sum". `start_from`: the kept entries continue from the "base" or from the
    values "found". Gates need a learning rate of their own: `AdamW(tuner.parameter_groups(lr))`.
    Costs, in dense steps, the base, w, alpha, their gradients and optimizer state; then O(B).
    Source: Guo, Rush, Kim (2021), Parameter-Efficient Transfer Learning with Diff Pruning, arXiv 2012.07463.

    >>> import selectune as st
    >>> st.diff_pruning(budget=0.005, steps=100).dense.latents
    {'difference': None, 'gate': 0.1, 'group': 0.1}
    """
    gates = Gates(penalty, structured, group_penalty, start_from, lr=dense_lr, gate_lr=gate_lr)
    return compose("diff-pruning", scores.change(), Rounds(budget, steps, dense), scope, train_fully, dense=gates)
