"""Cases and checks that the tests of the ops share."""

from __future__ import annotations

import torch
from hypothesis import strategies as some
from tolerances import close
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@some.composite
def products(draw, dtypes=FLOATS, most=40, tokens=300):
    """dy (t, o), x (t, i) and flat indices of k entries, 0 <= k <= o i, ascending."""
    t = draw(some.sampled_from([1, 2, 15, 16, 17, 127, 128, 129, tokens]))
    t = min(t, tokens)
    o, i = draw(some.integers(1, most)), draw(some.integers(1, most))
    k = draw(some.sampled_from([0, 1, o * i // 3, o * i]))
    dtype = draw(some.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(some.integers(0, 99)))
    flat = torch.randperm(o * i, generator=g)[:k].sort().values
    dy, x = (torch.randn(t, n, generator=g).to(dtype) for n in (o, i))
    return dy, x, flat


@some.composite
def scored(draw, dtypes=FLOATS, longest=9000):
    """weight (n,), gradient (n,), exp, eps, cutoff."""
    n = draw(some.sampled_from([0, 1, 31, 32, 33, 1000, longest]))
    g = torch.Generator().manual_seed(draw(some.integers(0, 99)))
    weight = torch.randn(n, generator=g).to(draw(some.sampled_from(dtypes)))
    gradient = torch.randn(n, generator=g).to(draw(some.sampled_from(dtypes)))
    gradient[torch.rand(n, generator=g) < 0.2] = 0
    for bad in draw(some.lists(some.sampled_from([float("nan"), float("inf"), -float("inf")]), max_size=1)):
        if n:
            draw(some.sampled_from([weight, gradient]))[draw(some.integers(0, n - 1))] = bad
    exp = draw(some.sampled_from([0.0, 1.0, 2.0]))
    eps = draw(some.sampled_from([1.0, 1e-3, 0.0]))
    cutoff = draw(some.sampled_from([float("-inf"), 0.0, 1e-40, 0.1, 1.0, 3.0, 1e30]))
    return weight, gradient, exp, eps, cutoff


def check_sampled(got: Tensor, dy: Tensor, x: Tensor, flat: Tensor) -> None:
    wide_dy, wide_x = dy.double(), x.double()
    assert got.dtype == (torch.float64 if dy.dtype == torch.float64 else torch.float32)
    close(
        "sampled_matmul", got, (wide_dy.mT @ wide_x).view(-1)[flat], dy.dtype,
        (wide_dy.abs().mT @ wide_x.abs()).view(-1)[flat],
    )  # fmt: skip


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    view = integers[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(view), b.view(view))
