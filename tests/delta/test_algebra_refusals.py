"""What arithmetic on deltas refuses, what its results record, and tensors other than float parameters."""

from __future__ import annotations

import math

import pytest
import torch
from delta_kit import Bag, finite, make_delta, random_bits, small, snapshot
from torch import nn

from selectune.delta import Delta, Patch, Shelf, base_info, digest_bits, switch
from selectune.delta.combine import algebra
from selectune.errors import BaseMismatchError, ConfigError, DeltaError, DeltaStateError, NonFiniteError


def model_of(**tensors: torch.Tensor) -> Bag:
    return Bag({"w": torch.ones(4), **tensors})


def one(model: nn.Module, at: int, value: float, **more) -> Delta:
    more.setdefault("old_values", True)
    return make_delta(model, {"w": torch.tensor([at])}, {"w": torch.tensor([value])}, **more)


MERGES = {
    "add": lambda deltas, **kw: algebra.add(deltas, **kw),
    "scale": lambda deltas, **kw: algebra.scale(deltas[-1], 0.5, **kw),
    "negate": lambda deltas, **kw: algebra.negate(deltas[-1], **kw),
    "intersect": lambda deltas, **kw: algebra.intersect(deltas[0], deltas[-1], **kw),
    "ties": lambda deltas, **kw: algebra.ties(deltas, density=0.5, **kw),
    "dare": lambda deltas, **kw: algebra.dare(deltas, drop=0.0, **kw),
    "conflicts": lambda deltas, **kw: algebra.conflicts(deltas, **kw),
}
every_merge = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
every_pair = pytest.mark.parametrize(
    "merge", [f for n, f in MERGES.items() if n not in ("scale", "negate")],
    ids=[n for n in MERGES if n not in ("scale", "negate")],
)  # fmt: skip


@every_merge
def test_without_the_bases_values_nothing_goes(merge):
    model = model_of()
    deltas = [one(model, 0, 2.0, old_values=False), one(model, 1, 2.0, old_values=False)]
    with pytest.raises(DeltaError, match=r"does not carry them: pass base=the base model, or save .* old_values=True"):
        merge(deltas)
    before = snapshot(model)
    merge(deltas, base=model)
    assert snapshot(model) == before


@every_merge
def test_a_model_that_is_not_the_base(merge):
    model = model_of()
    deltas = [one(model, 0, 2.0), one(model, 1, 2.0)]
    other = model_of()
    with torch.no_grad():
        other.w[1] = 1.5
    with pytest.raises(BaseMismatchError, match="not the base"):
        merge(deltas, base=other)
    with pytest.raises(BaseMismatchError, match="not the base"):
        merge(deltas, base=Bag({"w": torch.ones(5)}))


@every_pair
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Bag({"w": torch.ones(2, 2)}), r"F32 \(4,\).*F32 \(2, 2\)|F32 \(2, 2\).*F32 \(4,\)"),
        (Bag({"w": torch.ones(4, dtype=torch.float64)}), "F64"),
        (Bag({"w": torch.ones(4), "v": torch.ones(1)}), "different tensors, shapes, dtypes or ties"),
        (Bag({"w": torch.full((4,), 2.0)}), "different base values"),
    ],
    ids=["shape", "dtype", "more tensors", "values"],
)
def test_deltas_of_different_bases(merge, other, said):
    model = model_of()
    second = make_delta(
        other, {"w": torch.tensor([0])}, {"w": torch.tensor([7.0], dtype=other.w.dtype)}, old_values=True
    )
    with pytest.raises(BaseMismatchError, match=said):
        merge([one(model, 0, 2.0), second])


@every_pair
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "b"}, "recorded as a and b; if these are one model, pass it as base="),
        ({"weights": "1" * 64}, "weights of their bases have different digests"),
        ({"initialised": [{"name": "w", "digest": "0" * 16}]}, "drawn otherwise"),
    ],
    ids=["id", "weights", "head"],
)
def test_records_of_the_base_that_disagree(merge, change, said):
    model = model_of()
    base = {**base_info(model, id="a", initialised=["w"]), "weights": "0" * 64 if "weights" in change else None}
    with pytest.raises(BaseMismatchError, match=said):
        merge([one(model, 0, 2.0, base=base), one(model, 1, 2.0, base={**base, **change})])


def test_a_base_under_two_names_is_settled_by_its_bits():
    model = model_of()
    deltas = [one(model, i, 2.0, base=base_info(model, id=name)) for i, name in enumerate("ab")]
    assert algebra.add(deltas, base=model).info["base"]["id"] == "a"
    full = [one(model, i, 2.0, base=base_info(model, id=name, full=True)) for i, name in enumerate("ab")]
    assert algebra.add(full).selected == 2


@every_merge
def test_a_model_under_a_tuner(merge):
    model = model_of()
    model.register_parameter("selectune_values", nn.Parameter(torch.zeros(1)))
    with pytest.raises(DeltaStateError, match="tuner"):
        merge([one(model_of(), 0, 2.0)] * 2, base=model)


def test_the_base_is_seen_under_an_applied_delta():
    model = model_of()
    deltas = [one(model, 0, 2.0, old_values=False), one(model, 1, 3.0, old_values=False)]
    bare = algebra.add(deltas, base=model)
    with deltas[0].applied(model):
        assert algebra.add(deltas, base=model) == bare


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda d: algebra.add([]), "at least one delta"),
        (lambda d: algebra.add(["runs/a"]), "got str"),
        (lambda d: algebra.add([d, d], weights=[1.0]), "a number for each delta: 2; got 1"),
        (lambda d: algebra.add([d], weights=[math.nan]), "finite number; got nan"),
        (lambda d: algebra.add([d], weights=[True]), "finite number; got True"),
        (lambda d: algebra.scale(d, math.inf), "factor must be a finite number"),
        (lambda d: algebra.scale(d, "2"), "factor must be a finite number; got '2'"),
        (lambda d: algebra.ties([d], density=0.0), r"in \(0, 1\]; got 0.0"),
        (lambda d: algebra.ties([d], density=1.1), r"in \(0, 1\]; got 1.1"),
        (lambda d: algebra.ties([d, d], density=1.0, weights=[1, 0]), "above 0"),
        (lambda d: algebra.dare([d], drop=1.0), r"in \[0, 1\); got 1.0"),
        (lambda d: algebra.dare([d], drop=-0.1), r"in \[0, 1\)"),
        (lambda d: algebra.dare([d], drop=0.5, seed=-1), "seed must be an integer from 0"),
        (lambda d: algebra.dare([d], drop=0.5, seed=1.0), "seed must be an integer"),
        (lambda d: algebra.overlap(d, "x"), "got str"),
    ],
)
def test_arguments(call, said):
    with pytest.raises(ConfigError, match=said):
        call(one(model_of(), 0, 2.0))


def test_sums_that_leave_the_range():
    model = Bag({"w": torch.ones(4, dtype=torch.float16)})
    high = make_delta(
        model, {"w": torch.tensor([2])}, {"w": torch.tensor([60000.0], dtype=torch.float16)}, old_values=True
    )
    with pytest.raises(NonFiniteError, match='"w"'):
        algebra.scale(high, 2.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_base_without_differences(bad):
    """A delta may replace a NaN of the base. It can be added, and it cannot be scaled."""
    model = Bag({"w": torch.tensor([1.0, bad, 1.0, 1.0])})
    heals, other = one(model, 1, 2.0), one(model, 0, 5.0)
    both = algebra.add([heals, other])
    with both.applied(model):
        assert model.w.tolist() == [5.0, 2.0, 1.0, 1.0]
    for call in (
        lambda: algebra.scale(heals, 0.5),
        lambda: algebra.add([heals, one(model, 1, 3.0)]),
        lambda: algebra.ties([heals, other], density=1.0),
        lambda: algebra.dare([heals], drop=0.5, seed=21),
    ):
        with pytest.raises(NonFiniteError, match=r'base of "w" holds .* at entry 1'):
            call()


# --- what the result records


def test_the_result_names_its_parents_and_keeps_what_they_agree_on():
    model = model_of()
    infos = [{"method": {"name": name, "task": "glue/rte", "max_length": n}} for n, name in enumerate(("id3", "pafi"))]
    deltas = [one(model, i, 2.0, info=info) for i, info in enumerate(infos)]
    info = algebra.add(deltas).info
    assert info["method"] == {
        "name": "add",
        "weights": [1.0, 1.0],
        "conflicts": {"written": 2, "shared": 0, "opposed": 0},
        "parents": [
            {"digest": deltas[0].digest, "name": "id3", "selected": 1},
            {"digest": deltas[1].digest, "name": "pafi", "selected": 1},
        ],
        "task": "glue/rte",
    }
    assert (info["budget"], info["selected"]) == (None, 2)
    assert algebra.scale(one(model, 0, 2.0, info={"budget": 3}), 2.0).info["budget"] == 3


def test_what_all_carry_the_result_carries():
    model = model_of()
    bare, full = one(model, 0, 2.0, old_values=False), one(model, 1, 2.0)
    assert algebra.add([full, full]).reversible
    assert not algebra.add([full, bare], base=model).reversible


def test_results_go_through_the_file_and_verify(tmp_path):
    model, delta = small()
    for number, made in enumerate(
        (algebra.scale(delta, 2.0), algebra.negate(delta), algebra.ties([delta], density=0.5))
    ):
        assert Delta.from_bytes(made.to_bytes()) == made
        assert made.verify(model).ok
        assert made.save(tmp_path / f"{number}.safetensors").exists()


def test_an_empty_delta_adds_nothing():
    model = model_of()
    nothing = make_delta(model, {}, {})
    assert algebra.add([nothing, one(model, 0, 2.0)]).digest == one(model, 0, 2.0).digest
    assert algebra.ties([nothing], density=0.1).selected == 0
    assert algebra.overlap(nothing, nothing).ratio == 0.0


def test_old_values_that_lie_are_refused_before_anything():
    """Two deltas whose old values are consistent with their digests but not with each other."""
    model, other = model_of(), Bag({"w": torch.tensor([1.0, -0.0, 1.0, 1.0])})
    zero = Bag({"w": torch.tensor([1.0, 0.0, 1.0, 1.0])})
    with pytest.raises(BaseMismatchError, match='different base values of "w"'):
        algebra.add([one(other, 1, 2.0), one(zero, 1, 2.0)])
    assert algebra.add([one(model, 1, 2.0), one(other, 2, 2.0)]).selected == 2  # nothing they carry disagrees ...
    with pytest.raises(BaseMismatchError):  # ... and the base settles it
        algebra.add([one(model, 1, 2.0), one(other, 1, 2.0)], base=model)


# --- whole tensors


def buffered(**buffers: torch.Tensor) -> Bag:
    return Bag({"w": torch.ones(2)}, buffers)


def whole(model: Bag, **tensors: torch.Tensor) -> Delta:
    return make_delta(model, {}, {}, dense=tensors, old_values=True)


def test_buffers_sum_and_are_averaged():
    model = buffered(mean=torch.tensor([1.0, 2.0]), count=torch.tensor(10))
    deltas = [
        whole(model, mean=torch.tensor([2.0, 2.0]), count=torch.tensor(15)),
        whole(model, mean=torch.tensor([4.0, 3.0]), count=torch.tensor(30)),
    ]
    summed = {entry.name: entry.tensor.tolist() for entry in algebra.add(deltas).dense}
    assert summed == {"mean": [5.0, 3.0], "count": 35}
    averaged = {entry.name: entry.tensor.tolist() for entry in algebra.ties(deltas, density=0.1).dense}
    assert averaged == {"mean": [3.0, 3.0], "count": 22}  # 22.5: to even
    dropped = {entry.name: entry.tensor.tolist() for entry in algebra.dare(deltas, drop=0.99).dense}
    assert dropped == summed
    assert {d.name: d.kind for d in algebra.add(deltas).dense} == {"mean": "buffer", "count": "buffer"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.uint32,
                                   torch.int64, torch.uint64], ids=str)  # fmt: skip
def test_integers(dtype):
    model = buffered(n=torch.tensor([3, 5], dtype=dtype))
    low, high = (whole(model, n=torch.tensor(row, dtype=dtype)) for row in ([4, 5], [9, 2]))
    assert [int(v) for v in algebra.add([low, high]).dense[0].tensor] == [10, 2]
    assert [int(v) for v in algebra.scale(high, 0.5).dense[0].tensor] == [6, 4]  # 3.5 to even
    top = whole(model, n=torch.tensor([min(torch.iinfo(dtype).max, 2**62), 5], dtype=dtype))
    with pytest.raises(DeltaError, match='entry 0 of "n" comes to'):
        algebra.scale(top, 2.0)
    assert algebra.add([top]).digest == top.digest


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
def test_what_cannot_be_computed_with_is_taken_over_or_refused(dtype):
    model = buffered(m=torch.tensor([0, 1]).to(dtype))
    flipped, same = whole(model, m=torch.tensor([1, 1]).to(dtype)), whole(model, m=torch.tensor([0, 1]).to(dtype))
    for merge in MERGES:
        if merge not in ("scale", "negate", "conflicts", "intersect"):
            assert MERGES[merge]([flipped, same]).dense[0].tensor.tolist() == [1, 1], merge
    with pytest.raises(DeltaError, match="only be taken over"):
        algebra.add([flipped, flipped])
    with pytest.raises(DeltaError, match="only be taken over"):
        algebra.scale(flipped, 0.5)


def test_a_tensor_that_is_whole_in_one_delta_and_scattered_in_another():
    model = model_of()
    all_of_it = make_delta(model, {}, {}, dense={"w": torch.tensor([2.0, 3.0, 1.0, 1.0])}, old_values=True)
    summed = algebra.add([all_of_it, one(model, 1, 5.0)])
    assert [entry.tensor.tolist() for entry in summed.dense] == [[2.0, 7.0, 1.0, 1.0]]
    assert algebra.intersect(all_of_it, one(model, 1, 5.0)).values["w"].tolist() == [3.0]
    assert algebra.overlap(all_of_it, one(model, 1, 5.0)).ratio == 0.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_scale_by_one_and_zero(dtype):
    """Factor 1 is the delta itself, factor 0 the base's bits, whatever those are."""
    model = Bag({"w": random_bits((40,), dtype, 1)})
    delta = make_delta(model, {"w": torch.arange(0, 40, 3)}, {"w": finite(14, dtype, 2)})
    assert algebra.scale(delta, 1.0, base=model).digest == delta.digest
    heals = torch.isfinite(model.w.double())[::3]
    finite_only = make_delta(model, {"w": torch.arange(0, 40, 3)[heals]}, {"w": finite(int(heals.sum()), dtype, 2)})
    before = snapshot(model)
    algebra.scale(finite_only, 0.0, base=model).apply(model)
    assert snapshot(model) == before


def test_a_zeroed_patch_is_a_whole_tensor():
    model = model_of()
    listed, old = torch.tensor([1]), model.w.detach()
    patch = Patch("w", (4,), torch.float32, listed, torch.tensor([3.0]), digest_bits(old), old, zeroed=True)
    pruned = Delta([patch], [], {"base": base_info(model)})
    assert algebra.overlap(pruned, one(model, 1, 2.0)).ratio == 1.0
    for made, values in (
        (algebra.add([pruned, one(model, 0, 5.0)]), [4.0, 3.0, 0.0, 0.0]),
        (algebra.negate(pruned, base=model), [2.0, -1.0, 2.0, 2.0]),
    ):
        with made.applied(model):
            assert model.w.tolist() == values
    Shelf(model, {"pruned": pruned, "one": one(model, 2, 7.0)})
    for name in ("one", "pruned", "one", None):
        switch(model, name)
        assert model.w.tolist() == {"pruned": [0.0, 3.0, 0.0, 0.0], "one": [1.0, 1.0, 7.0, 1.0]}.get(name, [1.0] * 4)
