"""Ops against plain dense arithmetic: every backend, odd shapes, empty supports, any strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from selectune import ops
from selectune.ops import backend, cpu, reference

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# half operands are widened first, so they too are held to float32's


@some.composite
def products(draw, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    t, o, i = draw(some.integers(1, 40)), draw(some.integers(1, 17)), draw(some.integers(1, 17))
    k = draw(some.integers(0, o * i))
    dtype = draw(some.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(some.integers(0, 99)))
    flat = torch.randperm(o * i, generator=g)[:k].sort().values
    dy, x = (torch.randn(t, n, generator=g).to(dtype) for n in (o, i))
    return dy, x, flat


def check(got, dy, x, flat):
    dense = (dy.double().mT @ x.double()).view(-1)[flat]
    assert got.dtype == (torch.float64 if dy.dtype == torch.float64 else torch.float32)
    assert torch.allclose(got.double(), dense, rtol=TOLERANCE[dy.dtype], atol=TOLERANCE[dy.dtype] * 40)


@given(products())
def test_reference_is_the_dense_gradient_at_the_support(case):
    dy, x, flat = case
    check(reference.sampled_matmul(dy, x, flat // x.shape[1], flat % x.shape[1]), *case)


@given(products(dtypes=(torch.float32, torch.float64)))
def test_cpu_kernel_is_the_reference(case):
    dy, x, flat = case
    check(cpu.sampled_matmul(dy, x, flat // x.shape[1], flat % x.shape[1]), *case)


@given(products(dtypes=(torch.float32, torch.float64)), some.integers(1, 4))
def test_cpu_kernel_with_several_threads(case, threads):
    dy, x, flat = case
    torch.set_num_threads(threads)
    try:
        check(cpu.sampled_matmul(dy, x, flat // x.shape[1], flat % x.shape[1]), *case)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dense_above", [0.0, 1.1], ids=["dense", "sampled"])
@settings(max_examples=40)
@given(case=products())
def test_either_choice_gives_the_gradient(dense_above, case):
    dy, x, flat = case
    before, backend.DENSE_ABOVE = backend.DENSE_ABOVE, dense_above
    try:
        if dense_above == 0.0 and dy.dtype in (torch.bfloat16, torch.float16):
            return  # the dense product rounds in half precision: checked by the next test
        check(ops.sampled_matmul(dy, x, flat // x.shape[1], flat % x.shape[1]), *case)
    finally:
        backend.DENSE_ABOVE = before


def test_without_numba_the_dense_product_answers(monkeypatch):
    monkeypatch.setattr(backend, "_numba", lambda: False)
    dy, x, flat = torch.randn(7, 5), torch.randn(7, 3), torch.tensor([0, 4, 14])
    check(ops.sampled_matmul(dy, x, flat // 3, flat % 3), dy, x, flat)
    assert "numba is not installed" in ops.explain()


@given(some.integers(0, 99), some.integers(0, 12), some.integers(1, 9), some.integers(1, 5))
def test_embedding_gradients_at_the_support(seed, t, v, d):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, v, (t,), generator=g)
    dy = torch.randn(t, d, generator=g)
    dense = torch.zeros(v, d)
    for at, row in enumerate(ids.tolist()):
        if row >= 0:
            dense[row] += dy[at]
    flat = torch.randperm(v * d, generator=g)[: v * d // 2].sort().values
    assert torch.allclose(ops.sampled_rows(dy, ids, flat // d, flat % d), dense.view(-1)[flat], atol=1e-6)
    rows, block = ops.row_sums(dy, ids)
    assert rows.tolist() == sorted({r for r in ids.tolist() if r >= 0})
    assert torch.allclose(torch.zeros(v, d).index_add(0, rows, block), dense, atol=1e-6)


def layouts(shape):
    yield torch.randn(shape)
    yield torch.randn(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    yield torch.randn([2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)]
    if len(shape) == 4:
        yield torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4), (2, 3, 4, 5)])
def test_entries_are_read_and_written_in_place_whatever_the_strides(shape):
    for tensor in layouts(shape):
        flat = torch.arange(0, tensor.numel(), 2)
        expected = tensor.reshape(-1)[flat]
        assert torch.equal(ops.gather_entries(tensor, flat), expected)
        untouched = tensor.reshape(-1)[1::2].clone()
        ops.scatter_entries(tensor, flat, -expected)
        assert torch.equal(tensor.reshape(-1)[flat], -expected)
        assert torch.equal(tensor.reshape(-1)[1::2], untouched)


def test_bits_tell_apart_what_numbers_do_not():
    zeros = torch.tensor([0.0, -0.0])
    assert bool(zeros[0] == zeros[1])
    assert ops.bits(zeros)[0] != ops.bits(zeros)[1]
    assert ops.checksum(zeros) != ops.checksum(torch.zeros(2))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.complex64, torch.complex128]
)
def test_a_checksum_sees_every_single_bit(dtype):
    tensor = (torch.rand(50) * 100).to(dtype)
    before = ops.checksum(tensor)
    for byte in range(0, tensor.numel() * tensor.element_size(), 3):
        raw = tensor.view(torch.uint8)
        raw[byte] ^= 1 << (byte % 8)
        assert ops.checksum(tensor) != before
        raw[byte] ^= 1 << (byte % 8)
    assert ops.checksum(tensor) == before
