"""The slow truth for arithmetic on deltas: scalar by scalar, in Python floats, rounded by search in a table."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from delta_kit import INTS, Bag, make_delta, subset
from hypothesis import strategies as st
from torch import Tensor

from selectune.delta import Delta

SHAPES = {"a.weight": (3, 4), "a.bias": (5,), "head": (2, 2)}


@functools.cache
def table(dtype: torch.dtype) -> tuple[list[float], list[int]]:
    """All finite values of a narrow dtype, rising, without -0.0, and their bits."""
    count = 1 << (8 * dtype.itemsize)
    patterns = torch.arange(count).to(INTS[dtype.itemsize])
    rows = {
        float(value): int(pattern)
        for pattern, value in zip(patterns.tolist(), patterns.view(dtype).double().tolist(), strict=True)
        if math.isfinite(value) and not (value == 0 and math.copysign(1, value) < 0)
    }
    values = sorted(rows)
    return values, [rows[value] for value in values]


def rounded(value: float, dtype: torch.dtype) -> float:
    """To nearest, ties to even, by comparing with both neighbours as fractions."""
    if dtype.itemsize >= 4:
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))
    values, patterns = table(dtype)
    at = bisect.bisect_left(values, value)
    if at == len(values) or value < values[0]:
        return math.copysign(math.inf, value)
    if values[at] == value or at == 0:
        return values[at]
    low, high = Fraction(value) - Fraction(values[at - 1]), Fraction(values[at]) - Fraction(value)
    if low == high:
        return values[at] if patterns[at] % 2 == 0 else values[at - 1]
    return values[at - 1] if low < high else values[at]


def flat(tensor: Tensor) -> list[float]:
    return tensor.detach().double().reshape(-1).tolist()


def dense_values(delta: Delta, base: Bag) -> dict[str, list[float | None]]:
    """The delta's values over whole tensors; None where it does not write."""
    found: dict[str, list[float | None]] = {}
    for name, tensor in base.named_parameters():
        row: list[float | None] = [None] * tensor.numel()
        for at, value in zip(
            delta.support.get(name, torch.zeros(0)).tolist(), flat(delta.values.get(name, torch.zeros(0))), strict=True
        ):
            row[at] = value
        found[name] = row
    for entry in delta.dense:
        found[entry.name] = list(flat(entry.tensor))
    return found


def settle(base: float, terms: Sequence[tuple[float, float]], divide: float, dtype: torch.dtype) -> float:
    """base + (sum of factor * (new - base)) / divide, over the (factor, new) of deltas that change it."""
    if not terms:
        return base
    if len(terms) == 1 and terms[0][0] == divide:
        return terms[0][1]
    total = 0.0
    for factor, new in terms:
        total += factor * (new - base)
    return rounded(base + total / divide, dtype) if total != 0 else base


def values_of(model: Bag) -> dict[str, list[float]]:
    return {name: flat(tensor) for name, tensor in model.named_parameters()}


def grid(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values on a coarse grid, so that ties and cancellation occur, and a few finer ones."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-6, 7, (count,), generator=source) / 2
    fine = torch.randn(count, generator=source)
    return torch.where(torch.rand(count, generator=source) < 0.5, coarse, fine).to(dtype)


@st.composite
def families(draw: st.DrawFn) -> tuple[Bag, list[Delta]]:
    """A model in a drawn dtype and one to four deltas on it, scattered and whole, all carrying the base's values."""
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]))
    seed = draw(st.integers(0, 10_000))
    model = Bag(
        {name: grid(math.prod(shape), dtype, seed + n).reshape(shape) for n, (name, shape) in enumerate(SHAPES.items())}
    )
    deltas = []
    for number in range(draw(st.integers(1, 4))):
        own = seed + 100 * number
        support = {
            name: subset(math.prod(SHAPES[name]), draw(st.integers(0, math.prod(SHAPES[name]))), own)
            for name in ("a.weight", "a.bias")
        }
        dense = {}
        kind = draw(st.sampled_from(["none", "patch", "whole"]))
        if kind == "whole":
            dense["head"] = grid(4, dtype, own + 7).reshape(2, 2)
        elif kind == "patch":
            support["head"] = subset(4, 2, own)
        values = {name: grid(len(where), dtype, own + 9) for name, where in support.items()}
        deltas.append(make_delta(model, support, values, dense=dense, old_values=True))
    return model, deltas
