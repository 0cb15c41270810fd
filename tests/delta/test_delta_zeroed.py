"""Zeroed patches, whose unlisted entries are 0: on the model, in the file, and in hostile files."""

from __future__ import annotations

import pytest
import torch
from delta_kit import FLOATS, LAYOUTS, Bag, bits_of, edited, laid_out, open_up, random_bits, repacked, snapshot, subset
from hypothesis import given
from hypothesis import strategies as some

from selectune.delta import Delta, Patch, base_info, digest_bits, weights_digest
from selectune.errors import BaseMismatchError, DeltaError, DeltaFormatError, DeltaStateError


def zeroed(name, whole, indices, values, *, old_values=False, order=None):
    old = whole.detach().clone().reshape(-1) if old_values else None
    return Patch(name, tuple(whole.shape), whole.dtype, indices, values, digest_bits(whole), old, order, True)


def plain(name, whole, indices, values, *, old_values=False, order=None):
    old = whole.detach().reshape(-1)[indices]
    return Patch.make(name, tuple(whole.shape), indices, values, old, old_values=old_values, order=order)


def small(old_values=True, kept=(1, 4)):
    model = Bag({"up": torch.arange(1.0, 7).view(2, 3), "down": torch.ones(4), "rest": torch.tensor([-0.0, 5.0, 6.0])})
    whole = dict(model.named_parameters())
    kept = torch.tensor(kept, dtype=torch.int64)
    patches = [
        zeroed("up", whole["up"], kept, torch.arange(7.0, 7 + len(kept)), old_values=old_values),
        zeroed("down", whole["down"], torch.empty(0, dtype=torch.int64), torch.empty(0), old_values=old_values),
        plain("rest", whole["rest"], torch.tensor([1]), torch.tensor([9.0]), old_values=old_values),
    ]
    info = {"base": base_info(model, full=True), "budget": len(kept) + 1, "versions": {}}
    return model, Delta(patches, [], info)


MODEL, DELTA = small()
GOOD = DELTA.to_bytes()


def test_what_is_not_listed_is_zero_and_comes_back():
    model, delta = small()
    base = snapshot(model)
    with delta.applied(model):
        assert model.up.tolist() == [[0.0, 7.0, 0.0], [0.0, 8.0, 0.0]]
        assert model.down.tolist() == [0.0] * 4
        assert bits_of(model.rest) == bits_of(torch.tensor([-0.0, 9.0, 6.0]))
    assert snapshot(model) == base


def test_a_file_holds_the_listed_entries_only():
    _, with_old = small()
    _, without = small(old_values=False)
    entries = open_up(without.to_bytes())[1]
    assert entries["values.F32"]["shape"] == [3]
    assert "old.F32" not in entries
    assert open_up(GOOD)[1]["old.F32"]["shape"] == [6 + 4 + 1]
    assert open_up(GOOD)[0]["zeroed"] == ["up", "down"]
    for delta in (with_old, without):
        again = Delta.from_bytes(delta.to_bytes())
        assert again == delta
        assert [p.zeroed for p in again.patches] == [True, True, False]
        assert again.selected == 3


@given(
    some.lists(
        some.tuples(some.sampled_from(FLOATS), some.lists(some.integers(1, 5), max_size=3), some.booleans(),
                    some.sampled_from(LAYOUTS)),
        min_size=1, max_size=4),
    some.booleans(), some.booleans(), some.integers(0, 2**20),
)  # fmt: skip
def test_save_load_apply_revert_is_exact(specs, old_values, order, seed):
    parameters = {f"p{i}": laid_out(random_bits(tuple(s), d, seed + i), how) for i, (d, s, _, how) in enumerate(specs)}
    model = Bag(parameters)
    patches, rank = [], 0
    for i, (dtype, shape, zero, _) in enumerate(specs):
        numel = torch.Size(shape).numel()
        indices = subset(numel, (seed + i) % (numel + 1), seed)
        values = torch.ones(len(indices)).to(dtype)
        ranks = torch.arange(rank, rank + len(indices), dtype=torch.int32) if order else None
        rank += len(indices)
        make = zeroed if zero else plain
        patches.append(make(f"p{i}", parameters[f"p{i}"], indices, values, old_values=old_values, order=ranks))
    delta = Delta(patches, [], {"base": base_info(model)})
    again = Delta.from_bytes(delta.to_bytes())
    assert again == delta
    assert again.digest == delta.digest
    base = snapshot(model)
    again.apply(model)
    for i, (dtype, shape, zero, _) in enumerate(specs):
        name = f"p{i}"
        expected = torch.zeros(torch.Size(shape).numel(), dtype=dtype) if zero else None
        here = bits_of(getattr(model, name))
        listed = dict(zip(delta.support.get(name, torch.empty(0)).tolist(), delta.values.get(name, []), strict=False))
        for at, bit in enumerate(here):
            if at in listed:
                assert bit == bits_of(listed[at].reshape(1))[0]
            else:
                assert bit == (0 if expected is not None else base[name][3][at])
    again.revert(model)
    assert snapshot(model) == base
    if again.reversible and old_values:
        again.merge(model)
        if snapshot(model) != base:
            again.revert(model)
        assert snapshot(model) == base


def test_a_zeroed_patch_is_another_delta_than_a_plain_one():
    model = Bag({"w": torch.ones(4)})
    at, new = torch.tensor([1]), torch.tensor([2.0])
    a, b = (Delta([make("w", model.w, at, new)], [], {"base": base_info(model)}) for make in (zeroed, plain))
    assert a.digest != b.digest
    a.apply(model)
    b_on_top = [0.0, 2.0, 0.0, 0.0]
    assert model.w.tolist() == b_on_top
    with pytest.raises(DeltaStateError, match="is applied"):
        b.apply(model)
    b.apply(model, stack=True)
    assert model.w.tolist() == b_on_top
    b.revert(model)
    a.revert(model)
    assert model.w.tolist() == [1.0] * 4


def test_every_entry_of_the_base_is_checked():
    for at in range(6):
        model, delta = small()
        with torch.no_grad():
            model.up.view(-1)[at] += 1
        before = snapshot(model)
        with pytest.raises(BaseMismatchError, match='"up" differs'):
            delta.apply(model)
        assert snapshot(model) == before


def test_revert_is_refused_when_an_unlisted_entry_moved():
    model, delta = small()
    delta.apply(model)
    with torch.no_grad():
        model.down[2] = -0.0
    with pytest.raises(DeltaStateError, match='"down" has other values'):
        delta.revert(model)


def test_verify_counts_the_listed_and_the_zeroed_apart():
    model, delta = small()
    base = weights_digest(model)
    report = delta.verify(model, full=True)
    assert report.ok
    assert (report.changed, report.selected, report.zeroed) == (3, 3, 4 + 4)
    assert weights_digest(model) == base


def test_old_values_take_a_merged_delta_off():
    model, delta = small()
    base = snapshot(model)
    delta.merge(model)
    assert delta.reversible
    Delta.from_bytes(delta.to_bytes()).revert(model)
    assert snapshot(model) == base


def change(**keys):
    return lambda: edited(GOOD, lambda m: m.update(**keys))


HOSTILE = {
    "zeroed empty": (change(zeroed=[]), "absent where there are none"),
    "zeroed a string": (change(zeroed="up"), "list of names"),
    "zeroed null": (change(zeroed=None), "list of names"),
    "zeroed of numbers": (change(zeroed=[0]), "list of names"),
    "zeroed of lists": (change(zeroed=[["up"]]), "list of names"),
    "zeroed an unknown name": (change(zeroed=["up", "down", "x"]), "some of its patches"),
    "zeroed twice": (change(zeroed=["up", "down", "down"]), "some of its patches"),
    "zeroed in another order": (change(zeroed=["down", "up"]), "some of its patches"),
    "zeroed missing": (lambda: edited(GOOD, lambda m: m.pop("zeroed")), "integer from 1"),
    "zeroed of one more": (change(zeroed=["up", "down", "rest"]), "calls for"),
    "zeroed of one less": (change(zeroed=["up"]), "integer from 1"),
    "a name that is no string": (lambda: edited(GOOD, lambda m: m["patches"][0].__setitem__(0, ["up"])), "some of"),
    "words for nothing": (lambda: edited(GOOD, lambda m: m["patches"][1].__setitem__(4, 1)), "integer from 0 to 0"),
    "words for nothing in a long tensor": (
        lambda: edited(GOOD, lambda m: m["patches"][1].__setitem__(slice(1, 5), [[70000], "F32", 0, 1])),
        "integer from 0 to 0",
    ),
    "an endless tensor": (
        lambda: edited(GOOD, lambda m: m["patches"][1].__setitem__(1, [1 << 30, 1 << 30])),
        "calls for",
    ),
    "old values changed": (lambda: repacked(GOOD, "old.F32", bytes(44)), "digest"),
    "base digest of the listed only": (
        lambda: edited(GOOD, lambda m: m["patches"][0].__setitem__(5, digest_bits(torch.tensor([2.0, 5.0])))),
        "digest",
    ),
}


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_is_refused(make, message):
    with pytest.raises(DeltaFormatError, match=message):
        Delta.from_bytes(make())


def test_every_bit_flip_and_every_truncation_is_refused():
    data = bytearray(GOOD)
    for bit in range(8 * len(data)):
        data[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(DeltaFormatError):
            Delta.from_bytes(data)
        data[bit >> 3] ^= 1 << (bit & 7)
    for length in range(0, len(GOOD), 7):
        with pytest.raises(DeltaFormatError):
            Delta.from_bytes(GOOD[:length])


def test_an_endless_tensor_costs_nothing_until_it_meets_a_model():
    shape = (1 << 30, 1 << 30)
    patch = Patch("w", shape, torch.float32, torch.tensor([5]), torch.ones(1), "0" * 16, zeroed=True)
    model = Bag({"w": torch.ones(4)})
    delta = Delta.from_bytes(Delta([patch], [], {"base": base_info(model)}).to_bytes())
    with pytest.raises(BaseMismatchError, match="has shape"):
        delta.apply(model)


def test_parts_that_do_not_fit_are_refused():
    model = Bag({"w": torch.ones(4)})
    at, new = torch.tensor([1]), torch.tensor([2.0])
    bad = Patch("w", (4,), torch.float32, at, new, digest_bits(model.w), torch.ones(1), None, True)
    with pytest.raises(DeltaError, match=r"base values of \"w\" must be F32 \(4,\)"):
        Delta([bad], [], {"base": base_info(model)})
