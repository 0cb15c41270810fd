"""A draw is a function of seed and place: the same in any pieces and on every backend, and uniform."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from selectune import ops
from selectune.seeds import BITS, STEP, Stream, finish, mixed, signed, uniform

# the first outputs of splitmix64 from the seed 1234567, as the authors' C code gives them
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
dtypes = some.sampled_from([torch.float32, torch.float64])
_MASK = (1 << 64) - 1


def by_hand(key: int, at: int) -> int:
    """One output in Python's own integers."""
    x = (key + (at + 1) * STEP) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def test_the_published_sequence():
    assert [by_hand(1234567, k) for k in range(5)] == PUBLISHED
    at = torch.arange(1, 6) * signed(STEP) + 1234567
    assert [int(x) & _MASK for x in finish(at)] == PUBLISHED
    assert mixed(1234567) == PUBLISHED[0]


@given(some.integers(0, _MASK), some.integers(0, 2**40), some.sampled_from(list(BITS)), some.integers(1, 40))
def test_numbers_are_the_upper_bits(key, first, dtype, count):
    found = uniform(torch.empty(count, dtype=dtype), Stream(key, first))
    assert found.dtype == dtype
    expected = [(by_hand(key, first + k) >> (64 - BITS[dtype])) / 2 ** BITS[dtype] for k in range(count)]
    assert found.tolist() == expected
    assert max(expected) < 1


@given(some.integers(0, _MASK), some.lists(some.sampled_from([0, 1, 2, 255, 256, 257, 3000]), max_size=6), dtypes)
def test_pieces_draw_what_the_whole_does(key, sizes, dtype):
    ours = Stream(key)
    parts = [ops.uniform(torch.empty(size, dtype=dtype), ours) for size in sizes]
    whole = uniform(torch.empty(sum(sizes), dtype=dtype), Stream(key))
    assert torch.equal(torch.cat([torch.empty(0, dtype=dtype), *parts]), whole)
    assert ours.at == sum(sizes)


def test_draws_fill_tensors_of_any_strides_in_row_major_order():
    like = torch.empty(30, 40).t()
    for out in (None, torch.empty(30, 40).t(), torch.empty(40, 30)):
        found = ops.uniform(like, Stream(1), out)
        assert torch.equal(found, uniform(torch.empty(40, 30), Stream(1)))
        assert (found is out) == (out is not None and out.is_contiguous())


@pytest.mark.parametrize("name", ["reference", "numba", "triton", "dense"])
def test_every_backend_draws_the_same(monkeypatch, name):
    pytest.importorskip("triton" if name == "triton" else "numba")
    monkeypatch.setenv("SELECTUNE_BACKEND", name)
    room = torch.empty(3000)
    for found in (ops.uniform(room, Stream(4), out) for out in (None, room)):
        assert torch.equal(found, uniform(torch.empty(3000), Stream(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_even_and_neighbours_have_nothing_in_common(dtype):
    """Bounds of five standard deviations; the numbers are fixed, so nothing here is chance."""
    n = 1 << 16
    one, other = (uniform(torch.empty(n, dtype=dtype), Stream(mixed(6, step, 0))).double() for step in (1, 2))
    for u in (one, other):
        assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
        counts = torch.histc(u, 256, 0, 1)
        assert float(((counts - n / 256) ** 2 / (n / 256)).sum()) < 255 + 5 * math.sqrt(2 * 255)
    pairs = torch.stack((one, other, one.roll(1)))
    correlations = torch.corrcoef(pairs) - torch.eye(3)
    assert float(correlations.abs().max()) < 5 / math.sqrt(n)
