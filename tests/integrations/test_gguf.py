"""Layers on the blocks of a GGUF file, against the model that its reader makes of them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selectune.bits import int_view
from selectune.errors import ConfigError, ModelError
from selectune.integrations import gguf as blocks
from selectune.integrations.gguf import BlockEmbedding, BlockLinear, bytes_of, keep_blocks
from selectune.integrations.quantise import bytes_saved, quantise
from selectune.quantised import quantised_weights

gguf = pytest.importorskip("gguf", reason="gguf is not installed (requirements/lm.txt)")

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
BLOCK = 256  # entries in a block of the K types; those of the others are parts of it


class Tied(nn.Module):
    """Words in, logits out, by one table; and a layer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, BLOCK, padding_idx=3)
        self.inner = nn.Linear(BLOCK, BLOCK)
        self.out = nn.Linear(BLOCK, 40, bias=False)
        self.fresh = nn.Linear(40, 2)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.table(ids))))


def packed(shape: tuple[int, int], name: str) -> np.ndarray:
    """Blocks of a type: a matrix that the package quantises, or finite blocks drawn at random."""
    kind, drawn = gguf.GGMLQuantizationType[name], np.random.default_rng(0)
    try:
        return gguf.quantize(drawn.standard_normal(shape, dtype=np.float32), kind)
    except NotImplementedError:
        size, stored = gguf.GGML_QUANT_SIZES[kind]
        return drawn.integers(0, 60, (shape[0], shape[1] // size * stored), dtype=np.uint8)  # halves stay finite


def pair(tmp_path: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[Tied, Path]:
    """A model as it is loaded from a file, and the file, in which its rows have another order."""
    torch.manual_seed(0)
    model, file, kind = Tied(), tmp_path / "model.gguf", gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(file, "llama")
    for called, layer in (("a", model.table), ("b", model.inner)):
        rows = packed(tuple(layer.weight.shape), name)
        layer.weight.data = torch.from_numpy(gguf.dequantize(rows, kind))
        order = np.random.default_rng(1).permutation(len(rows))
        writer.add_tensor(called, rows[order].copy(), raw_dtype=kind)
    writer.add_tensor("norm", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.to(dtype), file


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(int_view(a), int_view(b))


def assert_close(a: Tensor, b: Tensor) -> None:
    """Equal but for the order of sums, relative to the largest entry."""
    torch.testing.assert_close(a, b, rtol=0, atol=torch.finfo(a.dtype).eps * 64 * float(b.detach().abs().max()))


@pytest.mark.parametrize("name", TYPES)
def test_layers_give_what_the_dequantised_model_gives(tmp_path, name):
    model, file = pair(tmp_path, name)
    plain = copy.deepcopy(model)
    assert keep_blocks(model, file) == 2
    assert (type(model.inner), type(model.out), type(model.table)) == (BlockLinear, BlockLinear, BlockEmbedding)
    assert model.out.weight is model.table.weight
    assert type(model.fresh) is nn.Linear
    ids = torch.tensor([[1, 3, 39], [0, 7, 7]])
    assert_close(model(ids), plain(ids))
    assert same(model.table(ids), plain.table(ids))
    ours, theirs = (torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in "ab")
    model.inner(ours).square().sum().backward()
    plain.inner(theirs).square().sum().backward()
    model.inner(ours[None]).add_(1).sum().backward()  # as adapters change outputs in place
    plain.inner(theirs[None]).add_(1).sum().backward()
    assert_close(ours.grad, theirs.grad)
    assert_close(model.inner.bias.grad, plain.inner.bias.grad)
    for weight, layer in zip(quantised_weights(model).values(), (plain.table, plain.inner), strict=True):
        assert same(weight.dequantise(), layer.weight.detach())
        assert weight.stored.kind == f"gguf.{name}"


def test_gguf_and_torch_dequantise_alike(tmp_path, monkeypatch):
    if blocks._by_torch() is None:
        pytest.skip("this version of transformers dequantises by NumPy")
    for name in TYPES:
        rows, kind = torch.from_numpy(packed((3, BLOCK), name)), int(gguf.GGMLQuantizationType[name])
        by_torch = blocks._numbers(rows, kind)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "_by_torch", lambda: None)
            assert same(blocks._numbers(rows, kind), by_torch), name


def test_wide_layers_are_read_some_rows_at_a_time(tmp_path, monkeypatch):
    model, file = pair(tmp_path, "Q8_0")
    plain = copy.deepcopy(model)
    keep_blocks(model, file)
    monkeypatch.setattr(blocks, "PIECE", 7 * BLOCK)  # 40 rows are no multiple of 7
    ours, theirs = (torch.randn(4, 5, BLOCK, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in "ab")
    for layer in ("inner", "out"):
        got, wanted = getattr(model, layer)(ours), getattr(plain, layer)(theirs)
        assert_close(got, wanted)
        got.sum().backward()
        wanted.sum().backward()
        assert_close(ours.grad, theirs.grad)


def test_a_model_in_half_precision_and_under_autocast(tmp_path):
    model, file = pair(tmp_path, "Q4_1", torch.bfloat16)
    plain, ids = copy.deepcopy(model), torch.tensor([[1, 5, 9]])
    assert keep_blocks(model, file) == 2
    assert_close(model(ids), plain(ids))
    model, file = pair(tmp_path, "Q4_1")
    plain = copy.deepcopy(model)
    keep_blocks(model, file)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(ids), plain(ids))
        model(ids).sum().backward()
    assert_close(model.to(torch.bfloat16)(ids), plain.to(torch.bfloat16)(ids))  # the blocks stay as they are
    assert model.table.weight.dtype == torch.uint8


def test_copies_and_saved_states_keep_the_blocks(tmp_path):
    model, file = pair(tmp_path, "Q4_K")
    ids = torch.tensor([[1, 5, 9]])
    keep_blocks(model, file)
    wanted = model(ids)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "whole.pt")
    read = torch.load(tmp_path / "whole.pt", weights_only=False)
    again, _ = pair(tmp_path, "Q4_K")
    keep_blocks(again, file)
    again.load_state_dict(model.state_dict())
    for other in (twin, read, again):
        assert_close(other(ids), wanted)
        assert [q.digest() for q in quantised_weights(other).values()] == [
            q.digest() for q in quantised_weights(model).values()
        ]
        assert other.out.weight is other.table.weight


def test_sizes(tmp_path):
    model, file = pair(tmp_path, "Q8_0")
    numbers = (40 + BLOCK) * BLOCK
    assert bytes_of(file) == (numbers // 32 * 34, numbers)
    assert bytes_saved(model, "gguf", file) == 4 * numbers - numbers // 32 * 34
    before = sum(p.nbytes for p in model.parameters())
    keep_blocks(model, file)
    assert before - sum(p.nbytes for p in model.parameters()) == 4 * numbers - numbers // 32 * 34


def test_what_is_refused(tmp_path, monkeypatch):
    model, file = pair(tmp_path, "Q4_0")
    with torch.no_grad():
        model.table.weight[3, 4] += 1e-3
        model.inner.weight[0, 0] += 1e-3
    with pytest.raises(ConfigError, match=r"No weight of the model has the numbers of a block of .*model\.gguf"):
        quantise(model, "gguf", file=file)
    assert (type(model.table), type(model.inner)) == (nn.Embedding, nn.Linear)
    with pytest.raises(ConfigError, match="this model comes from none"):
        quantise(model, "gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="pip install gguf"):
        keep_blocks(model, file)
