"""The order of selection in a delta: few bits for the step of each scalar, one code, and older files are read."""

from __future__ import annotations

import re

import pytest
import torch
from delta_kit import Bag, edited, open_up, repacked, stream_of
from hypothesis import given, settings
from hypothesis import strategies as some

import selectune as st
from selectune.delta import Delta, Patch, base_info
from selectune.delta.file import format as layout
from selectune.errors import DeltaFormatError

MODEL = Bag({"a": torch.zeros(40), "b": torch.zeros(60)})


def of(ranks: list[int]) -> Delta:
    """A delta with these ranks, some in each of two tensors."""
    patches = []
    for name, mine in (("a", ranks[: len(ranks) // 2]), ("b", ranks[len(ranks) // 2 :])):
        values, order = torch.ones(len(mine)), torch.tensor(mine, dtype=torch.int32)
        at = torch.arange(len(mine))
        patches.append(Patch.make(name, (40 if name == "a" else 60,), at, values, torch.zeros(len(mine)), order=order))
    return Delta(patches, [], {"base": base_info(MODEL)})


def ranks_of(delta: Delta) -> list[int]:
    return torch.cat([patch.order for patch in delta.patches if patch.order is not None]).tolist()


def order_stream(data: bytes) -> str:
    return next(key for key in open_up(data)[1] if key.startswith("order"))


@settings(max_examples=60)
@given(some.lists(some.one_of(some.integers(0, 6), some.integers(0, 2**31 - 1)), min_size=1, max_size=80))
def test_ranks_come_back_in_their_shortest_code(ranks):
    data = of(ranks).to_bytes()
    again = Delta.from_bytes(data)
    assert ranks_of(again) == ranks
    assert again.to_bytes() == data
    key = order_stream(data)
    if len(set(ranks)) == len(ranks):
        assert key == "order"
        return
    bits = max(1, max(ranks).bit_length())
    assert key == f"order.{bits}"
    stream = int.from_bytes(stream_of(data, key), "little")  # by the page: the lowest bit first
    assert [stream >> (bits * at) & (2**bits - 1) for at in range(len(ranks))] == ranks
    assert len(stream_of(data, key)) == -(-bits * len(ranks) // 8)


def test_an_older_file_with_shared_ranks_is_read(monkeypatch):
    ranks = [0, 0, 1, 5, 5]
    with monkeypatch.context() as patch:
        patch.setattr(layout, "bits_of_ranks", lambda ranks: None)
        old = of(ranks).to_bytes()
    assert order_stream(old) == "order"
    assert ranks_of(Delta.from_bytes(old)) == ranks
    assert Delta.from_bytes(old) == of(ranks)


def test_another_code_is_refused(monkeypatch):
    data = of([0, 0, 1, 5, 5]).to_bytes()  # 15 bits of 2 bytes
    stream = stream_of(data, "order.3")
    with pytest.raises(DeltaFormatError, match="cannot be read"):
        Delta.from_bytes(repacked(data, "order.3", bytes([stream[0], stream[1] | 0x80])))  # a bit behind the last
    with pytest.raises(DeltaFormatError, match="cannot be read"):
        Delta.from_bytes(repacked(data, "order.3", bytes(2)))  # all ranks 0: 1 bit is enough
    distinct = sum(rank << (3 * at) for at, rank in enumerate([0, 1, 2, 3, 5])).to_bytes(2, "little")
    with pytest.raises(DeltaFormatError, match="cannot be read"):
        Delta.from_bytes(repacked(data, "order.3", distinct))  # these are a stream of U32
    for bits in (4, 31):
        with monkeypatch.context() as patch:
            patch.setattr(layout, "bits_of_ranks", lambda ranks, bits=bits: bits)
            longer = of([0, 0, 1, 5, 5]).to_bytes()
        with pytest.raises(DeltaFormatError, match=f"{bits} bits for each of 5 ranks"):
            Delta.from_bytes(longer)
    both = edited(data, lambda metadata: metadata["digests"].update(order="0" * 64))
    with pytest.raises(DeltaFormatError, match="not those that its metadata announces"):
        Delta.from_bytes(both)


def trained(method: st.Method, steps: int, taken: int | None = None, **save) -> Delta:
    torch.manual_seed(0)
    model = torch.nn.Linear(60, 40)
    tuner = st.attach(model, method)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for step in range(taken or steps):
        x = torch.randn(4, 60, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = tuner.delta(**save)
    tuner.detach()
    return delta


def test_it_is_stored_where_the_support_grows_step_by_step():
    steps = 10
    full, none, usual = (trained(st.id3(1000, steps), steps, order=order) for order in (True, False, None))
    assert none.patches[0].order is None
    assert sorted(ranks_of(full)) == list(range(1000))
    assert ranks_of(usual) == [rank // 100 for rank in ranks_of(full)]
    assert usual.digest == none.digest == full.digest
    assert usual.nbytes - none.nbytes <= 4 * 1000 / 8 + 250  # the stream, and its name, digest and padding
    assert full.nbytes - none.nbytes >= 4000
    assert ranks_of(trained(st.id3(1000, steps), steps, taken=1)) == [0] * 100
    assert set(ranks_of(trained(st.id3(1000, steps, every=5), steps))) == {0, 5}
    for method in (st.pafi(100), st.repeat_d3(100, steps), st.rigl(100, steps)):
        assert trained(method, steps).patches[0].order is None, method.name


@pytest.mark.parametrize("steps", [300, 10_000, 65_536])
def test_a_file_has_less_than_8_bytes_a_scalar(steps):
    """Ranks drawn from all steps, at .17 % of a million weights; what is said once aside."""
    model = Bag({"w": torch.zeros(1_000_000)})
    draw = torch.Generator().manual_seed(0)
    at = torch.randperm(1_000_000, generator=draw)[:1700].sort().values
    ranks = torch.randint(steps, (1700,), generator=draw, dtype=torch.int32)
    ranks[:2] = steps - 1
    patch = Patch.make("w", (1_000_000,), at, torch.ones(1700), torch.zeros(1700), order=ranks)
    data = Delta([patch], [], {"base": base_info(model)}).to_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    bits = int(re.fullmatch(r"order\.(\d+)", order_stream(data))[1])  # pyright: ignore[reportOptionalSubscript]
    assert bits == (steps - 1).bit_length()
    assert len(data) - begin <= 1700 * (6 + bits / 8) + 1 <= 1700 * 8 + 1
