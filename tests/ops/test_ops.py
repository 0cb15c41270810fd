"""Ops in plain torch only: embedding gradients, entries of any strides, bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from selectune import ops
from selectune.ops import reference


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
    width = {16: 8}.get(tensor.element_size(), tensor.element_size())
    numbers = np.frombuffer(tensor.view(torch.uint8).numpy().tobytes(), dtype=f"<u{width}").tolist()
    expected = sum(number * (2 * place + 1) for place, number in enumerate(numbers)) % (1 << 64)
    assert ops.checksum(tensor) == reference.checksum(tensor) == expected
    before = ops.checksum(tensor)
    for byte in range(0, tensor.numel() * tensor.element_size(), 3):
        raw = tensor.view(torch.uint8)
        raw[byte] ^= 1 << (byte % 8)
        assert ops.checksum(tensor) != before
        raw[byte] ^= 1 << (byte % 8)
    assert ops.checksum(tensor) == before


def test_a_checksum_sees_two_entries_that_change_places():
    tensor = torch.randn(1000)
    before = ops.checksum(tensor)
    for one, two in ((0, 1), (3, 999), (512, 256)):
        tensor[[one, two]] = tensor[[two, one]]
        assert ops.checksum(tensor) != before
        tensor[[one, two]] = tensor[[two, one]]
    assert ops.checksum(tensor) == before


@pytest.mark.parametrize("size", [0, 1, (1 << 17) - 1, (1 << 20) + 7])
def test_a_checksum_is_the_same_in_pieces_on_threads_and_by_places(size):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size))
    whole = ops.checksum(tensor)
    assert whole == reference.checksum(tensor) == ops.checksum(tensor, torch.arange(size))
    some = torch.arange(0, size, 3)
    rest = torch.arange(size)[torch.arange(size) % 3 != 0]
    assert whole == (ops.checksum(tensor[some], some) + ops.checksum(tensor[rest], rest)) % (1 << 64)
