"""The zoo's oracle: plain autograd on a copy of the model, and ID3 by its formula. Nothing of selectune is imported.

All tensors in scope lie in one line: a position is a number in the concatenation of the row-major tensors, in the
model's order. At every step, from the dense gradient g of all of them: score |g| / (|w| + 1)^2 where g is not 0 and
the entry is not selected yet; the quota's best by score, then position, join; SGD moves what is selected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SELECTING = 2  # steps over which the budget is selected; the steps after them select nothing
STEPS = 4
RATE = 0.01

Losses = Callable[[int, int], Tensor]  # (step, micro-batch) -> its loss, a graph of the model trained


@dataclass(frozen=True)
class Line:
    """Where each tensor in scope lies in the one line of all of them."""

    names: tuple[str, ...]
    starts: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, model: nn.Module) -> Line:
        names, starts, size = [], [], 0
        for name, parameter in in_scope(model).items():
            names.append(name)
            starts.append(size)
            size += parameter.numel()
        return cls(tuple(names), tuple(starts), size)

    def positions(self, support: dict[str, Tensor]) -> Tensor:
        """A support by name, as sorted positions."""
        start = dict(zip(self.names, self.starts, strict=True))
        parts = [flat.long() + start[name] for name, flat in support.items()]
        return torch.cat(parts).sort().values if parts else torch.zeros(0, dtype=torch.int64)

    def counts(self, positions: Tensor) -> dict[str, int]:
        """How many positions fall into which tensor."""
        ends = [*self.starts[1:], self.size]
        found = {
            name: int(((positions >= start) & (positions < end)).sum())
            for name, start, end in zip(self.names, self.starts, ends, strict=True)
        }
        return {name: count for name, count in found.items() if count}


@dataclass
class Step:
    """One step of a run: its loss, what was selected after it, the gradient there, and (the oracle) all scores."""

    loss: float
    support: Tensor  # sorted positions
    gradient: Tensor  # at the support
    scores: Tensor | None = None  # of all positions, before this step's selection; those taken are -1
    cutoff: float = 0.0  # the least score that this step took


@dataclass
class Run:
    steps: list[Step]
    weights: Tensor  # of the whole line, at the end
    budget: int


def in_scope(model: nn.Module) -> dict[str, nn.Parameter]:
    """What can be selected: trainable floating tensors, each once, under their first name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}


def line_of(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors]) if tensors else torch.zeros(0)


def dense_gradient(model: nn.Module, losses: Losses, step: int, micros: int) -> tuple[float, Tensor]:
    """The loss of a step and its gradient over the whole line."""
    parameters = list(in_scope(model).values())
    for parameter in parameters:
        parameter.grad = None
    total = 0.0
    for micro in range(micros):
        loss = losses(step, micro) / micros
        loss.backward()
        total += float(loss.detach())
    return total, line_of([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def dense_run(model: nn.Module, losses: Losses, budget: int, micros: int, steps: int = STEPS) -> Run:
    """ID3 and SGD on dense gradients."""
    parameters = list(in_scope(model).values())
    support = torch.zeros(0, dtype=torch.int64)
    done: list[Step] = []
    for step in range(steps):
        loss, gradient = dense_gradient(model, losses, step, micros)
        weights = line_of(parameters)
        scores = gradient.double().abs() / (weights.double().abs() + 1.0) ** 2
        scores[scores == 0] = -1.0
        scores[support] = -1.0
        quota = min((step + 1) * budget // SELECTING, budget) - len(support)
        best = scores.sort(descending=True, stable=True)  # equal scores: the lower position first
        quota = min(quota, int((scores >= 0).sum()))
        chosen = best.indices[:quota]
        cutoff = float(best.values[quota - 1]) if quota else 0.0
        support = torch.cat([support, chosen]).sort().values
        done.append(Step(loss, support, gradient[support], scores, cutoff))
        weights[support] -= RATE * gradient[support]
        _write(parameters, weights)
    return Run(done, line_of(parameters), budget)


def _write(parameters: list[nn.Parameter], weights: Tensor) -> None:
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(weights[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()
