"""The product with a sparse matrix: few entries one by one, many as one dense product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as draw

from selectune import ops

SHAPES = draw.tuples(draw.integers(0, 9), draw.integers(1, 40), draw.integers(1, 40), draw.integers(0, 60))


@given(SHAPES, draw.sampled_from([torch.float32, torch.float64, torch.bfloat16]), draw.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_it_is_the_dense_product(shape, dtype, seed):
    (t, i, o, count), source = shape, torch.Generator().manual_seed(seed)
    flat = torch.randperm(o * i, generator=source)[:count].sort().values
    x, values = torch.randn(t, i, generator=source).to(dtype), torch.randn(flat.numel(), generator=source)
    dense = torch.zeros(o * i, dtype=torch.float64).index_copy_(0, flat, values.double()).view(o, i)
    found = ops.sparse_product(x, flat // i, flat % i, values, o)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), x.double() @ dense.mT, rtol=1e-5, atol=1e-5)
    turned = ops.sparse_product(found.to(dtype), flat % i, flat // i, values, i)
    torch.testing.assert_close(turned.double(), found.to(dtype).double() @ dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [3, 3_000])
def test_two_calls_give_the_same_bits(count):
    flat = torch.randperm(64 * 96, generator=torch.Generator().manual_seed(0))[:count].sort().values
    x, values = torch.randn(50, 96), torch.randn(count)
    first, second = (ops.sparse_product(x, flat // 96, flat % 96, values, 64) for _ in range(2))
    assert torch.equal(first, second)
