"""Numbers drawn by our loops are torch's own, bit for bit, and so is the generator that they leave behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from selectune import ops
from selectune.ops import cpu, draws

sizes = some.sampled_from([1, 2, 3, 255, 256, 257, 311, 312, 623, 624, 625, 1023, 1024, 1025, 2047, 2048, 2049, 5000])
dtypes = some.sampled_from([torch.float32, torch.float64])


def test_the_state_of_the_generator_is_understood():
    assert cpu._generator_is_known()


@settings(max_examples=60, deadline=None)
@given(some.integers(-(2**63), 2**64 - 1), some.lists(some.tuples(sizes, dtypes, some.booleans()), max_size=6))
def test_draws_are_those_of_torch(seed, rounds):
    """Any mix of ours and of torch's own draws, in any sizes, of either precision."""
    ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
    for size, dtype, by_torch in rounds:
        like = torch.empty(size, dtype=dtype)
        expected = torch.rand(size, dtype=dtype, generator=theirs)
        found = torch.rand(size, dtype=dtype, generator=ours) if by_torch else cpu.uniform(like, ours)
        assert torch.equal(found, expected)
        assert torch.equal(ours.get_state(), theirs.get_state())


@given(some.integers(0, 2**32), some.integers(0, 700), dtypes)
def test_a_generator_in_the_middle_of_its_words_goes_on(seed, before, dtype):
    ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
    for generator in (ours, theirs):
        torch.randint(9, (before,), generator=generator)
    like = torch.empty(900, dtype=dtype)
    assert torch.equal(cpu.uniform(like, ours), torch.rand(900, dtype=dtype, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_draws_fill_tensors_of_any_strides_in_row_major_order():
    like = torch.empty(30, 40).t()
    for out in (None, torch.empty(30, 40).t(), torch.empty(40, 30)):
        found = ops.uniform(like, torch.Generator().manual_seed(1), out)
        assert torch.equal(found, torch.rand(40, 30, generator=torch.Generator().manual_seed(1)))
        assert (found is out) == (out is not None and out.is_contiguous())


@pytest.mark.parametrize("name", ["reference", "numba", "triton", "dense"])
def test_every_backend_draws_the_same(monkeypatch, name):
    pytest.importorskip("triton" if name == "triton" else "numba")
    monkeypatch.setenv("SELECTUNE_BACKEND", name)
    room = torch.empty(3000)
    for found in (ops.uniform(room, torch.Generator().manual_seed(4), out) for out in (None, room)):
        assert torch.equal(found, torch.rand(3000, generator=torch.Generator().manual_seed(4)))


def test_a_generator_of_another_make_is_left_to_torch(monkeypatch, caplog):
    """Were the state laid out in another way, the numbers would not be torch's, and torch would draw them."""
    cpu._generator_is_known.cache_clear()
    monkeypatch.setattr(cpu, "_STATE", slice(32, 32 + 8 * draws.WORDS))
    with caplog.at_level("INFO", logger="selectune"):
        assert not cpu._generator_is_known()
    found = cpu.uniform(torch.empty(3000), torch.Generator().manual_seed(4))
    assert torch.equal(found, torch.rand(3000, generator=torch.Generator().manual_seed(4)))
    assert "drawn by torch" in caplog.text
    cpu._generator_is_known.cache_clear()
