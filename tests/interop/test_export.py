"""`selectune export`: what comes out computes what the delta's model computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_kit import load, logits, make_llama, tokens, train, trained
from safetensors import safe_open
from safetensors.torch import load_file

import selectune as st
from selectune.delta import Delta, Patch
from selectune.delta import load as load_delta
from selectune.errors import BaseMismatchError, ConfigError, DeltaError
from selectune.interop import bridges
from selectune.interop.patches import WeightUpdate, agrees, write
from selectune.models.restore import Source

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "base", max_shard_size="40KB")


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(llama, tmp_path_factory.mktemp("llama") / "run")


def applied(folder: Path, delta: Path) -> torch.Tensor:
    model = load(folder)
    load_delta(delta).apply(model)
    return logits(model)


def shards(folder: Path) -> dict[str, set[str]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = set(file.keys())
    return found


def test_merged_has_the_bits_the_shards_the_dtype_and_the_files_of_the_base(llama, run, tmp_path):
    told = bridges.export("merged", Source(str(llama)), run, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), applied(llama, run))
    assert told["shards"] > 1
    assert shards(tmp_path / "out") == shards(llama)
    names = {path.name for path in llama.iterdir()}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "generation_config.json" in names
    delta = load_delta(run)
    base, out = (
        {k: v for p in f.glob("*.safetensors") for k, v in load_file(p).items()} for f in (llama, tmp_path / "out")
    )
    changed = {name for name in base if not torch.equal(base[name], out[name])}
    assert changed == {patch.name for patch in delta.patches}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_keeps_half_precision(dtype, tmp_path):
    base = make_llama(tmp_path / "base", dtype=dtype)
    run = trained(base, tmp_path / "run")
    bridges.export("merged", Source(str(base)), run, tmp_path / "out")
    out = load(tmp_path / "out")
    assert out.dtype == dtype
    assert torch.equal(logits(out), applied(base, run))


def test_merged_with_a_fresh_head(tiny, tmp_path):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(tiny, num_labels=3).eval()
    method = st.id3(budget=60, steps=2, scope=st.Scope(train_fully=["classifier*"]))
    delta = train(model, method, 2)
    delta.save(tmp_path / "run")
    bridges.export("merged", Source(str(tiny)), tmp_path / "run", tmp_path / "out")
    delta.apply(model)
    out = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(out(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ConfigError, match="mergekit needs every tensor in the base"):
        bridges.export("mergekit", Source(str(tiny)), tmp_path / "run", tmp_path / "kit")
    with pytest.raises(DeltaError, match="not in the base's checkpoint"):
        bridges.export("vllm", Source(str(tiny)), tmp_path / "run", tmp_path / "vllm")
    assert not (tmp_path / "vllm").exists()


@pytest.mark.parametrize("kind", ["vllm", "safetensors-diff"])
def test_what_leaves_out_a_drawn_head_says_so(kind, tiny, tmp_path, caplog):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(tiny, num_labels=3).eval()
    train(model, st.random(budget=30, scope=["bert.encoder*"])).save(tmp_path / "run")
    caplog.clear()
    told = bridges.export(kind, Source(str(tiny)), tmp_path / "run", tmp_path / "out")
    assert told["fresh"] == ["classifier.bias", "classifier.weight"]
    assert f"{kind} holds only what training changed. 2 tensors of the model are in no checkpoint" in caplog.text
    assert "drawn from seed 0" in caplog.text


def test_mergekit_has_the_model_and_a_recipe(llama, run, tmp_path):
    bridges.export("mergekit", Source(str(llama)), run, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), applied(llama, run))
    recipe = (tmp_path / "out" / "mergekit.yml").read_text("utf-8")
    assert f"base_model: {json.dumps(str(llama.resolve()))}" in recipe
    assert "merge_method: task_arithmetic" in recipe
    assert "dtype: float32\nout_dtype: float32\n" in recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_mergekit_makes_the_model_again(dtype, tmp_path):
    """In fp32 base + (tuned - base) may be one unit in the last place off, in bf16 it is rounded to the tuned bits."""
    pytest.importorskip("mergekit", reason="mergekit is not among the tests' packages")
    base = make_llama(tmp_path / "base", dtype=dtype)
    run = trained(base, tmp_path / "run")
    bridges.export("mergekit", Source(str(base)), run, tmp_path / "out")
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", "mergekit.yml", str(tmp_path / "merged")]
    subprocess.run(command, cwd=tmp_path / "out", check=True, capture_output=True, timeout=300)
    model, found = load(base), load(tmp_path / "merged").state_dict()
    st.load(run).apply(model)
    far = torch.finfo(dtype).eps if dtype is torch.float32 else 0.0
    for name, wanted in model.state_dict().items():
        assert ((found[name] - wanted).abs() <= far * wanted.abs().clamp(min=1.0)).all()


class Server:
    """What vLLM's sparse transfer does with a patch: checkpoint names, int32 places, replacement values."""

    def __init__(self, folder: Path) -> None:
        self.weights = {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}

    def load(self, update: WeightUpdate) -> None:
        for patch in update.patches:
            weight = self.weights[patch.name]
            assert (patch.indices.dtype, patch.indices.dim()) == (torch.int32, 1)
            assert (tuple(weight.shape), weight.dtype) == (patch.full_shape, patch.values.dtype)
            assert torch.isfinite(patch.values).all()  # NaN would mean "unchanged"
            weight.view(-1)[patch.indices.long()] = patch.values


@pytest.mark.parametrize("tied", [False, True])
def test_vllm_patches_lead_there_and_back(tied, tmp_path):
    base = make_llama(tmp_path / "base", tied=tied)
    run = trained(base, tmp_path / "run", st.random(budget=300))
    told = bridges.export("vllm", Source(str(base)), run, tmp_path / "out")
    there, back = (
        WeightUpdate.from_bytes((tmp_path / "out" / f"{name}.safetensors").read_bytes()) for name in ("patch", "revert")
    )
    assert (there.base, there.target) == (back.target, back.base) == (told["base"], told["target"])
    assert there.base == load_delta(run).info["base"]["weights"][:16]
    bridges.export("merged", Source(str(base)), run, tmp_path / "merged")
    server, merged, plain = Server(base), Server(tmp_path / "merged"), Server(base)
    server.load(there)
    assert server.weights.keys() == merged.weights.keys()
    assert all(torch.equal(server.weights[name], merged.weights[name]) for name in merged.weights)
    assert ("lm_head.weight" in server.weights) != tied
    server.load(back)
    assert all(torch.equal(server.weights[name], plain.weights[name]) for name in plain.weights)


def test_vllm_names_are_the_checkpoints(tiny, tmp_path):
    """The checkpoint of a trunk has no prefix where the model with a head has one."""
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(tiny)
    delta = train(model, st.id3(budget=60, steps=2, scope=st.Scope(include=["bert.encoder*"])), 2)
    delta.save(tmp_path / "run")
    bridges.export("vllm", Source(str(tiny)), tmp_path / "run", tmp_path / "out")
    update = WeightUpdate.from_bytes((tmp_path / "out" / "patch.safetensors").read_bytes())
    with safe_open(tiny / "model.safetensors", "pt") as file:
        assert {patch.name for patch in update.patches} <= set(file.keys())


def test_vllm_refuses_a_dtype_that_rounds(llama, run, tmp_path):
    with pytest.raises(DeltaError, match=r"new values of .* are no BF16 numbers"):
        bridges.export("vllm", Source(str(llama)), run, tmp_path / "out", served="bfloat16")
    assert not list(tmp_path.iterdir())


def rounded(delta: Delta, base: Any) -> Delta:
    """The delta with values that bfloat16 holds."""
    patches = []
    for p in delta.patches:
        old = base.get_parameter(p.name).detach().reshape(-1)[p.indices]
        patches.append(Patch.make(p.name, p.shape, p.indices, p.values.bfloat16().float(), old))
    return Delta(patches, [], delta.info)


def test_vllm_casts_what_the_dtype_holds(llama, tmp_path):
    model = load(llama)
    delta = train(model, st.random(budget=50, scope=st.Scope(include=["*q_proj.weight"])))
    exact = rounded(delta, model)
    exact.save(tmp_path / "run")
    bridges.export("vllm", Source(str(llama)), tmp_path / "run", tmp_path / "out", served="bfloat16")
    there, back = (
        WeightUpdate.from_bytes((tmp_path / "out" / f"{name}.safetensors").read_bytes()) for name in ("patch", "revert")
    )
    served, plain = load(llama).bfloat16(), load(llama).bfloat16()
    write(served, there.patches)
    exact.apply(model)
    for patch in there.patches:
        assert torch.equal(
            dict(served.named_parameters())[patch.name], dict(model.named_parameters())[patch.name].bfloat16()
        )
    write(served, back.patches)
    assert agrees(plain, back.patches)
    assert all(torch.equal(a, b) for a, b in zip(served.parameters(), plain.parameters(), strict=True))


def test_an_update_that_was_touched_is_refused(llama, run, tmp_path):
    bridges.export("vllm", Source(str(llama)), run, tmp_path / "out")
    data = bytearray((tmp_path / "out" / "patch.safetensors").read_bytes())
    for at in (len(data) - 3, 40, 0):
        bad = bytearray(data)
        bad[at] ^= 1
        with pytest.raises(DeltaError):
            WeightUpdate.from_bytes(bad)
    for cut in (b"", data[:100], data[:-1]):
        with pytest.raises(DeltaError):
            WeightUpdate.from_bytes(cut)


@pytest.mark.parametrize("kind", sorted({*bridges.OUT} - {"dequantised"}))
def test_nothing_is_overwritten_or_left_half_written(kind, llama, run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="is not empty, and nothing is overwritten"):
        bridges.export(kind, Source(str(llama)), run, tmp_path / "full")
    with pytest.raises(ConfigError, match="is no folder"):
        bridges.export(kind, Source(str(llama)), run, tmp_path / "full" / "mine")
    other = make_llama(tmp_path / "other", seed=3)
    with pytest.raises(BaseMismatchError):
        bridges.export(kind, Source(str(other)), run, tmp_path / "wrong")
    writer = bridges.OUT[kind]

    def broken(*args):
        writer(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(bridges.OUT, kind, broken)
    with pytest.raises(DeltaError, match="No space left on device; nothing is left of it"):
        bridges.export(kind, Source(str(llama)), run, tmp_path / "broken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "other"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]


def test_unknown_kinds_are_refused(llama, run, tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown kind 'merge'\. Known: merged.*Did you mean merged"):
        bridges.export("merge", Source(str(llama)), run, tmp_path / "out")
    with pytest.raises(ConfigError, match="served=bf16 is for kind vllm"):
        bridges.export("merged", Source(str(llama)), run, tmp_path / "out", served="bf16")
