"""Patches beside quantised weights, format version 2: what is written, read again, and refused."""

from __future__ import annotations

import random

import pytest
import torch
from delta_kit import close_up, edited, mutated, open_up, repacked, sealed, small
from hypothesis import given, settings
from hypothesis import strategies as draw

from selectune.delta import Delta, Patch
from selectune.errors import DeltaError, DeltaFormatError, NonFiniteError

DELTA = small()[1]
GOOD = DELTA.to_bytes()
BASE = {**DELTA.info["base"], "fingerprint": None}


def patch(flat: list[int], values: list[float], name: str = "q.weight", **more) -> Patch:
    given = {"base_digest": "0123456789abcdef", "beside": True, **more}
    return Patch(name, (8, 4), torch.float32, torch.tensor(flat), torch.tensor(values), **given)


def delta(*patches: Patch, dense: bool = True) -> Delta:
    return Delta([*DELTA.patches, *patches], DELTA.dense if dense else [], {"base": BASE})


MINE = delta(patch([1, 5, 30], [0.5, -0.25, -0.0], order=torch.tensor([9, 8, 7])))
FILE = MINE.to_bytes()
META, ENTRIES, PAYLOAD = open_up(FILE)


def test_a_file_with_offsets_beside_is_of_version_2_and_others_stay_as_they_were():
    assert (META["version"], META["beside"]) == (2, ["q.weight"])
    again = Delta.from_bytes(FILE)
    assert again == MINE
    assert again.beside
    assert again.digest == MINE.digest
    assert "old.F32" in ENTRIES
    assert ENTRIES["old.F32"]["shape"] == [3]
    assert ENTRIES["values.F32"]["shape"] == [6]
    assert again.reversible
    old = again.patches[-1].old
    assert old is not None
    assert old.tolist() == [0, 0, 0]
    assert open_up(GOOD)[0]["version"] == 1
    assert "beside" not in open_up(GOOD)[0]
    entries = [1, 5, 30], [0.5, -0.25, -0.0]
    beside, replacing = (Delta([patch(*entries, beside=kind)], [], {"base": BASE}) for kind in (True, False))
    assert beside.digest != replacing.digest
    assert open_up(replacing.to_bytes())[0]["version"] == 1


@given(
    draw.dictionaries(draw.integers(0, 31), draw.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1)
)
@settings(max_examples=40, deadline=None)
def test_any_offsets_come_back(entries):
    flat = sorted(entries)
    made = Delta([patch(flat, [entries[at] for at in flat])], [], {"base": BASE})
    again = Delta.from_bytes(made.to_bytes())
    assert again.to_bytes() == made.to_bytes()
    assert again.patches[0].beside
    assert again.patches[0].values.view(torch.int32).tolist() == made.patches[0].values.view(torch.int32).tolist()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=1), "unknown: 'beside'"),
        (lambda m: m.pop("beside"), "missing: beside"),
        (lambda m: m.update(beside=[]), "list of names"),
        (lambda m: m.update(beside="q.weight"), "list of names"),
        (lambda m: m.update(beside=[["q.weight"]]), "list of names"),
        (lambda m: m.update(beside=["other"]), "some of its patches"),
        (lambda m: m.update(beside=["q.weight", "q.weight"]), "some of its patches"),
        (lambda m: m.update(beside=["q.weight", "layer.weight"]), "some of its patches"),
        (lambda m: m.update(beside=["layer.bias", "q.weight"]), "patch \"layer.bias\" has dtype 'BF16'"),
        (lambda m: m.update(beside=["layer.weight", "q.weight"]), "not those that its metadata|calls for"),
        (lambda m: m.update(zeroed=["q.weight"]), "beside a matrix"),
        (lambda m: m["patches"][-1].__setitem__(1, [2, 4, 4]), "beside a matrix"),
        (lambda m: m["patches"][-1].__setitem__(1, [32]), "beside a matrix"),
        (lambda m: m["patches"][-1].__setitem__(5, "0" * 16), "fingerprint"),
    ],
)
def test_what_does_not_fit_is_refused(edit, message):
    with pytest.raises(DeltaFormatError, match=message):
        Delta.from_bytes(edited(FILE, edit))


def test_values_that_are_not_finite_are_refused():
    broken = torch.tensor([-0.0, 7.0, 8.0, 0.5, float("inf"), 0.0]).numpy().tobytes()
    with pytest.raises(DeltaFormatError, match="not finite"):
        Delta.from_bytes(repacked(FILE, "values.F32", broken))
    with pytest.raises(NonFiniteError):
        delta(patch([1], [float("nan")], order=torch.tensor([9])))
    with pytest.raises(DeltaError, match="without old values"):
        delta(patch([1], [1.0], base_values=torch.tensor([0.0]), order=torch.tensor([9])))


def test_structured_mutants_of_version_2_raise_nothing_else():
    source = random.Random(8)
    for _ in range(750):
        metadata = mutated({k: v for k, v in META.items() if k != "digest"}, source)
        if not isinstance(metadata, dict):
            continue
        data = close_up(sealed(metadata), ENTRIES, PAYLOAD)
        try:
            found = Delta.from_bytes(data)
        except DeltaFormatError:
            continue
        assert found.to_bytes() == data
