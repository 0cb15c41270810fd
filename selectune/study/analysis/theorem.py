"""Theorem 1 of ID3, checked on a model whose inputs and labels can be enumerated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-12
EPS = (1.0, 1.5, 2.0, 10.0)
EXP = (0.0, 0.5, 1.0, 2.0, 5.0)
SCALES = (0.01, 1.0, 10.0)  # of the weights, so that |w| + eps is near 1, and far above


@dataclass(frozen=True)
class Model:
    """Softmax regression on `inputs` (n, d), each with the same probability: p(y | x) = softmax(x W), W (d, c).

    `labels` (n, c): the distribution of the label of each input. None: the model's own, so that the expected gradient
    is 0.
    """

    weight: Tensor
    inputs: Tensor
    labels: Tensor | None = None

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """E[g], I = E[g^2] and J = E|g| of every weight (d, c): exact sums over all inputs and labels."""
        answers = torch.softmax(self.inputs @ self.weight, -1)  # (n, c)
        labels = answers if self.labels is None else self.labels
        one_hot = torch.eye(answers.shape[1], dtype=answers.dtype)
        # for input n and label y: g = x (p - e_y)^T
        g = torch.einsum("nd,nyc->nydc", self.inputs, answers[:, None] - one_hot)
        chance = (labels / len(self.inputs))[..., None, None]
        return (chance * g).sum((0, 1)), (chance * g.square()).sum((0, 1)), (chance * g.abs()).sum((0, 1))


def heuristic(weight: Tensor, size: Tensor, eps: float, exp: float) -> Tensor:
    """H = J / (|w| + eps)^exp, the D3 score of the expected |g|."""
    return size / (weight.abs() + eps) ** exp


@dataclass(frozen=True)
class Checked:
    """`bound`: violations of J <= sqrt(I), `theorem`: of H <= sqrt(I), for eps >= 1 and exp >= 0.

    `counts` scalars were compared, each under every eps and exp. `mean`: the largest |E[g]| under the model's own
    labels. `negative`: violations of H <= sqrt(I) for exp = -1, among as many scalars.
    """

    counts: int
    bound: int
    theorem: int
    mean: float
    negative: int
    example: dict[str, Any]

    @property
    def violations(self) -> int:
        return self.bound + self.theorem


def check_theorem(seeds: int = 20) -> Checked:
    """Theorem 1, sqrt(E[g^2]) >= E|g| >= H for eps >= 1 and exp >= 0, on random models of 5 inputs and 3 classes.

    The first inequality is Jensen's and holds for labels of the model and of any data. The second needs
    (|w| + eps)^exp >= 1, so exp = -1 has counter-examples; `example` is one that needs no computer: w = 1, eps = 1 and
    g = 1 or -1, each half of the time. Float64. Source: Agarwal et al. (2025), arXiv 2408.14470, Theorem 1.

    >>> found = check_theorem(seeds=2)
    >>> found.violations, found.negative > 0, found.example["H"]
    (0, True, 2.0)
    """
    counts = bound = theorem = negative = 0
    mean = 0.0
    for model in _models(seeds):
        expected, fisher, size = model.moments()
        root = fisher.sqrt() + TOLERANCE
        counts += size.numel()
        bound += int((size > root).sum())
        negative += int((heuristic(model.weight, size, 1.0, -1.0) > root).sum())
        theorem += sum(int((heuristic(model.weight, size, e, x) > root).sum()) for e in EPS for x in EXP)
        if model.labels is None:
            mean = max(mean, float(expected.abs().max()))
    return Checked(counts, bound, theorem, mean, negative, _by_hand())


def _models(seeds: int) -> Iterator[Model]:
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        inputs, weight, labels = (
            torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((5, 4), (4, 3), (5, 3))
        )
        for scale in SCALES:
            yield Model(scale * weight, inputs)
            yield Model(scale * weight, inputs, torch.softmax(3 * labels, -1))


def _by_hand() -> dict[str, Any]:
    gradient, weight = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones((), dtype=torch.float64)
    fisher, size = gradient.square().mean(), gradient.abs().mean()
    found = {"w": 1.0, "eps": 1.0, "g": [1, -1], "exp": -1, "I": float(fisher), "J": float(size)}
    return {**found, "H": float(heuristic(weight, size, 1.0, -1.0)), "H of exp 2": float(heuristic(weight, size, 1, 2))}
