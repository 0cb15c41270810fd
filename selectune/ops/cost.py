"""The cost of a sampled gradient: a small linear model for each way of computing it, whose constants are fixed here.

    gather   t k a                      for few entries: nothing is transposed
    tiles    t (o + i) b + t k c        the operands are transposed in cache; one dot product per entry
    dense    t o i d                    the whole product, from which entries are picked

The ways sum in different orders, so the choice changes last bits. It therefore depends only on shapes, dtype and
device, and two runs give the same bytes.
"""

from __future__ import annotations

import torch

# nanoseconds of one core per unit of the formulas above; "start" per call
COSTS: dict[str, dict[str, float]] = {
    "float32": {"start": 60e3, "gather": 1.8, "turn": 0.5, "dot": 0.08, "dense": 0.013},
    "float64": {"start": 60e3, "gather": 2.2, "turn": 1.0, "dot": 0.16, "dense": 0.026},
    "half": {"start": 60e3, "gather": 1e9, "turn": 0.5, "dot": 0.08, "dense": 0.014},
    # a GPU, computed and not measured: the bytes of single entries against the speed of matrix units
    "cuda": {"start": 10e3, "gather": 1e9, "turn": 1e-3, "dot": 4e-3, "dense": 5e-6},
}


def choose(entries: int, tokens: int, outputs: int, inputs: int, dtype: torch.dtype, device: str = "cpu") -> str:
    """gather, tiles or dense: the cheapest by the model.

    >>> choose(4000, 1024, 768, 3072, torch.float32), choose(2_000_000, 1024, 768, 3072, torch.float32)
    ('tiles', 'dense')
    """
    costs = estimate(COSTS[_family(dtype) if device == "cpu" else device], entries, tokens, outputs, inputs)
    return min(costs, key=lambda way: costs[way])


def estimate(model: dict[str, float], entries: int, tokens: int, outputs: int, inputs: int) -> dict[str, float]:
    """Nanoseconds of every way on one core."""
    return {
        "gather": model["start"] + tokens * entries * model["gather"],
        "tiles": 2 * model["start"] + tokens * ((outputs + inputs) * model["turn"] + entries * model["dot"]),
        "dense": model["start"] / 4 + tokens * outputs * inputs * model["dense"],
    }


def _family(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.float64: "float64"}.get(dtype, "half")
