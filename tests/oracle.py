"""The slow, obvious reference: selective fine-tuning from its formulas, in dense float64.

Written from the papers' formulas alone and never importing selectune. Scores, the total order and the
schedules are NumPy and plain Python, one scalar at a time where that is clearest; the trainer is torch
with dense gradients, a mask, and an ordinary dense optimizer.

An entry is (t, i): number of the tensor, flat row-major index in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

Entry = tuple[int, int]
Arrays = Sequence[np.ndarray]
Scorer = Callable[[Arrays, Arrays], list[np.ndarray]]  # (weights, gradients) -> scores, all dense

# -- scores


def d3(weight: float, gradient: float, exp: float, eps: float) -> float:
    """H = |g| / (|w| + eps)^exp of one scalar."""
    return abs(gradient) / (abs(weight) + eps) ** exp


def pafi(weight: float) -> float:
    """H = -|w| of one scalar."""
    return -abs(weight)


def fisher(gradients: Iterable[Sequence[float]]) -> list[float]:
    """F_i = sum over single examples of g_i^2."""
    total: list[float] = []
    for example in gradients:
        total = total or [0.0] * len(example)
        for i, g in enumerate(example):
            total[i] += g * g
    return total


def expected_fisher(examples: Iterable[tuple[Sequence[float], Sequence[Sequence[float]]]]) -> list[float]:
    """F_i = sum over examples and classes c of p(c) (d(-log p(c))/d theta_i)^2.

    An example is (probabilities of the classes, gradient of -log p(c) for every class c).
    """
    return fisher([math.sqrt(p) * g for g in row] for ps, rows in examples for p, row in zip(ps, rows, strict=True))


def d3_scores(exp: float, eps: float) -> Scorer:
    """D3 of every scalar of every tensor; an entry that scores 0 is not eligible."""

    def scores(weights: Arrays, gradients: Arrays) -> list[np.ndarray]:
        dense = [
            np.array([d3(w, g, exp, eps) for w, g in zip(ws.ravel(), gs.ravel(), strict=True)])
            for ws, gs in zip(weights, gradients, strict=True)
        ]
        return [np.where(h == 0.0, -np.inf, h) for h in dense]

    return scores


def pafi_scores(weights: Arrays, gradients: Arrays) -> list[np.ndarray]:
    """-|w| of every scalar of every tensor."""
    del gradients
    return [np.array([pafi(w) for w in ws.ravel()]) for ws in weights]


# -- selection


def top_k(scores: Arrays, k: int, taken: Iterable[Entry] = ()) -> list[Entry]:
    """The k best entries: score descending, then tensor, then flat index ascending; -inf is not eligible.

    NaN or +inf anywhere: nothing is selected at this step.
    """
    if any(np.isnan(h).any() or np.isposinf(h).any() for h in scores):
        return []
    taken = set(taken)
    candidates = [
        (-float(h), t, i)
        for t, column in enumerate(scores)
        for i, h in enumerate(column.ravel())
        if not math.isinf(h) and (t, i) not in taken
    ]
    return [(t, i) for _, t, i in sorted(candidates)[:k]]


# -- schedules: quotas u_0 .. u_{T-1}


def cumulative(budget: int, steps: int, every: int = 1) -> list[int]:
    """u_t = floor((t+1) B / T) - floor(t B / T); with `every` = k the quotas of k steps come at once."""
    plain = [(t + 1) * budget // steps - t * budget // steps for t in range(steps)]
    return _gathered(plain, every)


def front(budget: int, steps: int, every: int = 1) -> list[int]:
    """floor(B / T) at every step, and one more at the first B mod T."""
    plain = [budget // steps + (1 if t < budget % steps else 0) for t in range(steps)]
    return _gathered(plain, every)


def one_shot(budget: int) -> list[int]:
    """Everything at step 0."""
    return [budget]


def _gathered(quotas: list[int], every: int) -> list[int]:
    return [sum(quotas[t : t + every]) if t % every == 0 else 0 for t in range(len(quotas))]


def updates(quotas: Sequence[int], steps: int) -> int:
    """Scalars given a gradient over a run: sum_s u_s (T - s)."""
    return sum(u * (steps - s) for s, u in enumerate(quotas))


# -- the trainer


@dataclass(frozen=True)
class Rule:
    """What is selected and when. `keeps`: the support only grows; else it is chosen afresh at each step."""

    scores: Scorer
    quotas: list[int]
    keeps: bool = True
    every: int = 1  # a quota that could not be filled is asked for again at the next multiple of this

    def wanted(self, step: int, have: int) -> int:
        """How many entries are selected at this step."""
        if not self.keeps:
            return self.quotas[0] if step < len(self.quotas) and step % self.every == 0 else 0
        if step % self.every:
            return 0
        return sum(self.quotas[: step + 1]) - have


@dataclass
class DenseOracle:
    """Dense gradients, selection by the formulas, masked gradient, an ordinary dense optimizer.

    `parameters`: the tensors in scope in their order, float64, each once. `barred`: entries that can
    never be selected. Every optimizer step: `backward` as often as there are micro-batches, then `step`.
    """

    parameters: list[nn.Parameter]
    rule: Rule
    optimizer: torch.optim.Optimizer
    barred: set[Entry] = field(default_factory=set)
    steps: int = 0
    support: list[Entry] = field(default_factory=list)  # in order of selection
    supports: list[set[Entry]] = field(default_factory=list)  # after every step

    def step(self) -> None:
        """Selects on the gradients that backward left on the parameters, masks them, and steps."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        wanted = self.rule.wanted(self.steps, len(self.support))
        if wanted:
            scores = self.rule.scores(self._arrays(self.parameters), self._arrays(gradients))
            taken = self.barred | (set(self.support) if self.rule.keeps else set())
            chosen = top_k(scores, wanted, taken)
            self.support = self.support + chosen if self.rule.keeps else chosen or self.support
        for t, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            mask = torch.zeros(parameter.numel(), dtype=torch.bool)
            mask[[i for tensor, i in self.support if tensor == t]] = True
            parameter.grad = torch.where(mask.view_as(parameter), gradient, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.supports.append(set(self.support))

    @staticmethod
    def _arrays(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        return [t.detach().numpy() for t in tensors]
