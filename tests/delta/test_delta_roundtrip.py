"""Bit-exactness: save, load, apply, revert on any shape, layout and dtype."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from delta_kit import (
    FLOATS,
    LAYOUTS,
    Bag,
    bits_of,
    finite,
    laid_out,
    make_delta,
    random_bits,
    small,
    snapshot,
    subset,
)
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load as safetensors_load

from selectune.delta import Delta, Dense, Patch, base_info, diff, load
from selectune.delta.file.fingerprint import digest_bits
from selectune.errors import DeltaError, DeltaFormatError, NonFiniteError

SHAPES = [(), (0,), (1,), (7,), (3, 5), (5, 1), (0, 4), (2, 3, 4), (2, 3, 4, 5)]

tensors = some.tuples(
    some.sampled_from(SHAPES),
    some.sampled_from(FLOATS),
    some.sampled_from(LAYOUTS),
    some.floats(0, 1),
    some.integers(0, 9999),
)


@settings(max_examples=150, deadline=None)
@given(some.lists(tensors, min_size=1, max_size=5), some.booleans(), some.booleans())
def test_save_load_apply_revert_is_exact(specs, old_values, order):
    parameters, support, values = {}, {}, {}
    for i, (shape, dtype, layout, density, seed) in enumerate(specs):
        tensor = laid_out(random_bits(shape, dtype, seed), layout)
        numel = tensor.numel()
        parameters[f"p{i}"] = tensor
        support[f"p{i}"] = subset(numel, round(density * numel), seed)
        values[f"p{i}"] = finite(len(support[f"p{i}"]), dtype, seed + 1)
    model = Bag(parameters)
    delta = make_delta(model, support, values, old_values=old_values, order=order)
    data = delta.to_bytes()
    loaded = Delta.from_bytes(data)
    assert loaded.to_bytes() == data
    assert loaded == delta
    assert {name: i.tolist() for name, i in loaded.support.items()} == {
        name: i.tolist() for name, i in support.items() if len(i)
    }
    for patch, again in zip(delta.patches, loaded.patches, strict=True):
        assert bits_of(patch.values) == bits_of(again.values)
        assert (patch.order is None) == (again.order is None) == (not order)
        assert patch.order is None or patch.order.tolist() == again.order.tolist()

    before = snapshot(model)
    expected = {name: list(bits) for name, (_, _, _, bits) in before.items()}
    for name, indices in support.items():
        for at, bits in zip(indices.tolist(), bits_of(values[name]), strict=True):
            expected[name][at] = bits
    loaded.apply(model)
    after = snapshot(model)
    assert {name: bits for name, (_, _, _, bits) in after.items()} == expected
    assert all(after[name][:3] == before[name][:3] for name in before)
    loaded.revert(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex64,
        *FLOATS,
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_dense_tensors_of_every_dtype(shape, dtype):
    new = torch.tensor([1, 0, 1, 1, 0, 1])[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    old = torch.zeros(shape, dtype=dtype)
    model = Bag({"w": torch.zeros(2)}, {"state": old.clone()})
    delta = make_delta(model, {}, {}, dense={"state": new}, old_values=True)
    again = Delta.from_bytes(delta.to_bytes())
    assert again == delta
    with again.applied(model):
        assert bits_of(model.state) == bits_of(new)
    assert bits_of(model.state) == bits_of(old)


def test_indices_beyond_sixteen_bits():
    model = Bag({"w": torch.zeros(400_000)})
    where = torch.tensor([0, 65_535, 65_536, 131_071, 131_072, 399_999])
    delta = make_delta(model, {"w": where}, {"w": torch.arange(1.0, 7.0)})
    with Delta.from_bytes(delta.to_bytes()).applied(model):
        assert model.w.nonzero().flatten().tolist() == where.tolist()
    assert not model.w.any()


def test_the_file_is_plain_safetensors_with_one_metadata_key():
    _, delta = small()
    data = delta.to_bytes()
    length = int.from_bytes(data[:8], "little")
    assert list(json.loads(data[8 : 8 + length])["__metadata__"]) == ["selectune"]
    found = safetensors_load(data)
    assert {key: bits_of(tensor) for key, tensor in found.items()} == {
        "values.F32": bits_of(torch.tensor([-0.0, 7.0, 8.0])),
        "values.BF16": bits_of(torch.tensor([2.0], dtype=torch.bfloat16)),
        "old.F32": bits_of(torch.tensor([1.0, 2.0, 23.0])),
        "old.BF16": bits_of(torch.tensor([1.0], dtype=torch.bfloat16)),
        "indices": [1, 0, 20, 3],
        "order": [2, 1, 0, 3],
        "dense.0": bits_of(torch.tensor([1.0, 2.0, 3.0])),
        "dense.1": [9],
        "old_dense.0": bits_of(torch.ones(3)),
        "old_dense.1": [3],
    }


def test_header_lengths_that_begin_like_a_pickle_are_none():
    """A header of 1408 = 0x0580 bytes makes a file that begins with the bytes of pickle protocol 5."""
    model = Bag({"w": torch.zeros(4)})
    begins = set()
    for length in range(0, 1200, 8):
        delta = make_delta(model, {"w": torch.tensor([1])}, {"w": torch.ones(1)}, info={"created_by": "x" * length})
        data = delta.to_bytes()
        assert Delta.from_bytes(data) == delta
        begins.add(data[:2])
    assert {b"\x80\x05", b"\x80\x06"} <= begins


def test_file_and_directory(tmp_path):
    _, delta = small()
    assert delta.save(tmp_path / "run") == tmp_path / "run" / "delta.safetensors"
    assert delta.save(tmp_path / "a" / "b.safetensors") == tmp_path / "a" / "b.safetensors"
    assert load(tmp_path / "run") == load(tmp_path / "a" / "b.safetensors") == delta
    assert (tmp_path / "run" / "delta.safetensors").read_bytes() == delta.to_bytes()
    assert delta.nbytes == len(delta.to_bytes())


def test_the_same_delta_is_the_same_file_in_another_process(tmp_path):
    _, delta = small()
    path = delta.save(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from delta_kit import small\n"
        "import hashlib; print(hashlib.sha256(small()[1].to_bytes()).hexdigest(), end='')"
    )
    here = os.path.dirname(__file__)
    env = os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = subprocess.run(
        [sys.executable, "-c", code, str(path), here], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert found == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 6.5), (torch.bfloat16, 4.5)], ids=str)
def test_bytes_per_scalar(dtype, limit):
    """38,000 scalars over the tensors of a six-layer MiniLM, biases and norms included."""
    shapes = {}
    for layer in range(6):
        at = f"bert.encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            shapes[f"{at}.attention.self.{part}.weight"] = (384, 384)
            shapes[f"{at}.attention.self.{part}.bias"] = (384,)
        shapes[f"{at}.attention.output.dense.weight"] = (384, 384)
        shapes[f"{at}.attention.output.dense.bias"] = (384,)
        shapes[f"{at}.attention.output.LayerNorm.weight"] = (384,)
        shapes[f"{at}.attention.output.LayerNorm.bias"] = (384,)
        shapes[f"{at}.intermediate.dense.weight"] = (1536, 384)
        shapes[f"{at}.intermediate.dense.bias"] = (1536,)
        shapes[f"{at}.output.dense.weight"] = (384, 1536)
        shapes[f"{at}.output.dense.bias"] = (384,)
        shapes[f"{at}.output.LayerNorm.weight"] = (384,)
        shapes[f"{at}.output.LayerNorm.bias"] = (384,)
    shapes["bert.embeddings.word_embeddings.weight"] = (30522, 384)
    shapes["classifier.weight"] = (2, 384)
    model = Bag({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()})
    total = sum(p.numel() for p in model.parameters())
    support, left = {}, 38_000
    for i, (name, shape) in enumerate(shapes.items()):
        numel = torch.Size(shape).numel()
        share = left if i == len(shapes) - 1 else min(max(1, numel * 38_000 // total), left)
        support[name] = subset(numel, min(share, numel), i)
        left -= len(support[name])
    values = {name: finite(len(indices), dtype, 5) for name, indices in support.items()}
    delta = make_delta(model, support, values, info={"method": {"name": "id3", "exp": 2.0, "eps": 1.0}})
    assert len(shapes) > 95
    assert delta.selected > 37_000
    assert delta.nbytes / delta.selected <= limit


def test_diff_turns_one_model_into_the_other():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Linear(4, 4))
    base = base.to(memory_format=torch.channels_last)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight[1, 0, 2, 1] = 5.0
        tuned[2].weight[2, 3] = -0.0
        tuned[2].weight[0, 0] += 1e-7
    tuned(torch.randn(2, 2, 6, 6))  # moves the running statistics
    delta = diff(base, tuned, old_values=True)
    assert delta.info["method"] == {"name": "diff"}
    assert {name: len(i) for name, i in delta.support.items()} == {"0.weight": 1, "2.weight": 2}
    assert [entry.name for entry in delta.dense] == [
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
    before, after = snapshot(base), snapshot(tuned)
    delta.apply(base)
    assert snapshot(base) == after
    delta.revert(base)
    assert snapshot(base) == before
    delta.revert(tuned)  # it carries the old values
    assert snapshot(tuned) == before


def test_diff_of_equal_models_is_empty_and_survives_a_file():
    base = Bag({"w": torch.tensor([float("nan"), -0.0])})
    delta = diff(base, copy.deepcopy(base))
    assert delta.selected == 0
    assert Delta.from_bytes(delta.to_bytes()) == delta
    with delta.applied(base):
        pass


def test_info_is_a_copy():
    _, delta = small()
    delta.info["base"]["structure"] = "x"
    delta.info["method"]["name"] = "y"
    assert delta.info["method"]["name"] == "id3"
    assert len(delta.info["base"]["structure"]) == 64
    assert delta.info["selected"] == delta.selected == 4


def test_the_delta_owns_its_tensors():
    model = Bag({"w": torch.zeros(4)})
    values = torch.tensor([1.0])
    delta = make_delta(model, {"w": torch.tensor([2])}, {"w": values}, dense={})
    values[0] = 9.0
    assert delta.values["w"].tolist() == [1.0]


def _patch(**changes):
    fields = {
        "name": "w", "shape": (4,), "dtype": torch.float32, "indices": torch.tensor([0, 2]),
        "values": torch.ones(2), "base_digest": "0" * 16,
    }  # fmt: skip
    return Patch(**{**fields, **changes})


BAD_PARTS = {
    "index beyond": [_patch(indices=torch.tensor([0, 4]))],
    "index negative": [_patch(indices=torch.tensor([-1, 2]))],
    "unsorted": [_patch(indices=torch.tensor([2, 0]))],
    "repeated": [_patch(indices=torch.tensor([2, 2]))],
    "int32 indices": [_patch(indices=torch.tensor([0, 2], dtype=torch.int32))],
    "value count": [_patch(values=torch.ones(3))],
    "value dtype": [_patch(values=torch.ones(2, dtype=torch.float64))],
    "integer weights": [_patch(dtype=torch.int32, values=torch.ones(2, dtype=torch.int32))],
    "old values of another digest": [_patch(base_values=torch.ones(2))],
    "order count": [_patch(order=torch.tensor([0]))],
    "order negative": [_patch(order=torch.tensor([0, -1]))],
    "name twice": [_patch(), _patch()],
    "name not allowed": [_patch(name="../w")],
    "order in some": [_patch(order=torch.tensor([0, 1])), _patch(name="v")],
}


@pytest.mark.parametrize("patches", BAD_PARTS.values(), ids=BAD_PARTS.keys())
def test_parts_that_do_not_fit_are_refused(patches):
    with pytest.raises(DeltaError):
        Delta(patches, [], {"base": base_info(Bag({"w": torch.zeros(4)}))})


def _dense(**changes):
    fields = {"name": "b", "kind": "buffer", "tensor": torch.ones(2), "base_digest": digest_bits(torch.zeros(2))}
    return Dense(**{**fields, **changes})


BAD_DENSE = {
    "kind unknown": ([], [_dense(kind="module")], "has kind 'module'"),
    "dtype outside the format": ([], [_dense(tensor=torch.ones(2, dtype=torch.complex128))], "has dtype complex128"),
    "base of another shape": ([], [_dense(base_tensor=torch.zeros(3))], "base tensor of"),
    "base of another dtype": ([], [_dense(base_tensor=torch.zeros(2).double())], "base tensor of"),
    "base of another digest": ([], [_dense(base_tensor=torch.ones(2))], "do not have the digest"),
    "old values in some": ([_patch()], [_dense(base_tensor=torch.zeros(2))], "all or none"),
}


@pytest.mark.parametrize(("patches", "dense", "message"), BAD_DENSE.values(), ids=BAD_DENSE.keys())
def test_dense_parts_that_do_not_fit_are_refused(patches, dense, message):
    with pytest.raises(DeltaError, match=message):
        Delta(patches, dense, {"base": base_info(Bag({"w": torch.zeros(4)}))})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    base = {"base": base_info(Bag({"w": torch.zeros(4)}))}
    with pytest.raises(NonFiniteError, match='"w"'):
        Delta([_patch(values=torch.tensor([1.0, bad]))], [], base)
    with pytest.raises(NonFiniteError, match='"w"'):
        Delta([], [Dense("w", "parameter", torch.tensor([0.0, bad]), "0" * 16)], base)


@pytest.mark.parametrize("info", [{}, {"base": {}}, {"base": {"id": "x"}}], ids=str)
def test_a_delta_needs_the_structure_of_its_base(info):
    with pytest.raises(DeltaFormatError, match="base_info"):
        Delta([_patch()], [], info)


def test_info_is_a_closed_schema():
    base = base_info(Bag({"w": torch.zeros(4)}))
    for extra in (
        {"time": 1},
        {"budget": 1},
        {"budget": True},
        {"selected": 3},
        {"method": {"exp": float("inf")}},
        {"method": {"f": print}},
        {"versions": {"torch": 2}},
        {"base": {**base, "more": 1}},
    ):
        with pytest.raises(DeltaFormatError):
            Delta([_patch()], [], {"base": base, **extra})
