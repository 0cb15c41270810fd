"""Retention: the loss on another text, before and after, with the checkpoint's own head for language."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lm_kit import make_llama, make_texts
from tiny_kit import WORDS, make_data, make_tokenizer
from torch.nn import functional as F

import selectune as st
from selectune import tasks
from selectune.errors import ConfigError, ModelError, TaskError
from selectune.models import retention
from selectune.models.bases import load_model
from selectune.models.restore import Source, evaluate_delta, load_base
from selectune.models.retention import held_out, text_of
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import Example, Head, Split

pytest_plugins = ("tiny_fixtures",)

PIQA = tasks.get("commonsense/piqa")
CAUSAL = Head("AutoModelForCausalLM")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Texts, multiple choice and GLUE."""
    return make_data(make_texts(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A BERT with its head for masked tokens, whose matrix is the embedding."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "masked"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, intermediate_size=64, max_position_embeddings=32,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": "[MASK]"}))
    return folder


def tuned(model, data, out, **more):
    settings = {"task": "glue/rte", "budget": 300, "max_steps": 4, "lr": 2e-2, "retain": "wikitext2"}
    return run(RunConfig(model=str(model), data=str(data), out=str(out), **settings | more))


def direct(lm, held) -> float:
    """The loss per token of a causal model from whole logits."""
    losses = []
    with torch.no_grad():
        for row in held.rows:
            ids = torch.tensor([row["input_ids"]])
            losses.append(F.cross_entropy(lm(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("more", [{}, {"method": "id3", "on": "lora:r=2"}], ids=["weights", "lora"])
def test_a_language_model_is_measured_itself(llama, both, tmp_path, more):
    if more:
        pytest.importorskip("peft")
    found = tuned(llama, both, tmp_path / "out", task=PIQA.name, **more)
    kept = found.evaluation.retention
    assert kept is not None
    assert kept.text == "text/wikitext2"
    written = json.loads((tmp_path / "out" / "run.json").read_text())["retention"]
    assert written == {"text": kept.text, "tokens": kept.tokens, "before": kept.before, "after": kept.after,
                       "forgetting": kept.after - kept.before}  # fmt: skip
    base = load_model(str(llama), CAUSAL, 0)
    held = held_out(*text_of("wikitext2", str(both)), base, str(llama))
    assert held.lm is None
    assert direct(base.model, held) == pytest.approx(kept.before, rel=1e-6)
    assert direct(st.load_model(found.delta), held) == pytest.approx(kept.after, rel=1e-6)
    assert kept.before != kept.after
    assert evaluate_delta(Source(str(llama)), found.delta, PIQA, str(both), retain="wikitext2") == found.evaluation


def test_the_trunk_of_a_classifier_is_measured_with_the_checkpoints_head(llama, both, tmp_path):
    found = tuned(llama, both, tmp_path / "out")
    kept = found.evaluation.retention
    assert kept is not None
    lm = load_model(str(llama), CAUSAL, 0)
    held = held_out(*text_of("text/wikitext2", str(both)), lm, str(llama))
    assert direct(lm.model, held) == pytest.approx(kept.before, rel=1e-6)
    trunk = st.load_model(found.delta).get_submodule("model")
    lm.model.model.load_state_dict(trunk.state_dict())
    assert direct(lm.model, held) == pytest.approx(kept.after, rel=1e-6)
    task = tasks.get("glue/rte")
    assert evaluate_delta(Source(str(llama)), found.delta, task, str(both), retain="wikitext2") == found.evaluation


def test_an_encoder_predicts_masked_tokens(masked, both, tmp_path):
    found = tuned(masked, both, tmp_path / "out")
    kept = found.evaluation.retention
    assert kept is not None
    assert kept.before != kept.after
    lm = load_model(str(masked), Head("AutoModelForMaskedLM"), 0)
    held = held_out(*text_of("wikitext2", str(both)), lm, str(masked))
    for row in held.rows:
        shown = [label == -100 or token == lm.tokenizer.mask_token_id
                 for token, label in zip(row["input_ids"], row["labels"], strict=True)]  # fmt: skip
        assert all(shown)
        assert row["answer"] == max(1, round(0.15 * (len(row["input_ids"]) - 2)))
    assert held.loss(lm.model) == pytest.approx(kept.before, rel=1e-6)
    trunk = load_base(Source(str(masked)), st.load(found.delta), None)
    with st.load(found.delta).applied(trunk.model):
        lm.model.bert.load_state_dict(trunk.model.bert.state_dict(), strict=False)
        lm.model.tie_weights()  # the head's matrix is the tuned embedding
    assert held.loss(lm.model) == pytest.approx(kept.after, rel=1e-6)


def test_a_checkpoint_without_a_head_is_refused(tiny, both, masked, tmp_path, monkeypatch):
    (tmp_path / "bert").mkdir()
    from transformers import BertForMaskedLM

    BertForMaskedLM.from_pretrained(masked).bert.save_pretrained(tmp_path / "bert")
    for path in masked.glob("tokenizer*"):
        (tmp_path / "bert" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=r"the checkpoint of 'bert' has none: cls\.predictions\."):
        tuned(tmp_path / "bert", both, tmp_path / "out")
    loaded = load_model(str(masked), tasks.get("glue/rte").head, 0)
    monkeypatch.setattr(loaded.model.config, "is_encoder_decoder", True)
    with pytest.raises(ModelError, match=r"'masked' \(bert\) is neither"):
        held_out(*text_of("wikitext2", str(both)), loaded, str(masked))


def test_a_file_of_text(llama, tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text("the dog sees a cat . " * 60, encoding="utf-8")
    name, rows = text_of(str(tmp_path / "own.txt"))
    assert name == "own.txt"
    loaded = load_model(str(llama), CAUSAL, 0)
    monkeypatch.setattr(retention, "TOKENS", 64)
    held = held_out(name, rows, loaded, str(llama))
    assert sum(row["answer"] for row in held.rows) == 2 * 31
    assert math.isfinite(held.loss(loaded.model))
    with pytest.raises(TaskError, match="at least 2 tokens"):
        held_out(name, Split((Example(("",), None),), "own"), loaded, str(llama))


def test_what_is_no_text(tmp_path, llama):
    with pytest.raises(ConfigError, match=r"retain=nothing is neither a text file nor one of text/wikitext2"):
        text_of("nothing")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TaskError, match=r"bytes\.txt is not UTF-8"):
        text_of(str(tmp_path / "bytes.txt"))
    with pytest.raises(ConfigError, match="there is no delta"):
        evaluate_delta(Source(str(llama)), None, PIQA, retain="wikitext2")
