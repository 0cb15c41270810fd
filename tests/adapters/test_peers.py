"""Modules through peft: on, off and merged without a trace; sizes of the papers; AdaLoRA's and LoRA+'s extras."""

from __future__ import annotations

import pytest
import torch
from adapters_kit import classifier, inputs, make, trace
from torch import nn

from selectune.adapters import KINDS, parse, peers, put_on
from selectune.errors import ConfigError, ModelError

pytest.importorskip("peft")
PEFT = [name for name, kind in KINDS.items() if kind.peft]
LAYERS = [name for name in PEFT if not KINDS[name].wraps]
SMALL = {"shira": "shira:r=2", "super": "super:sparsity=0.9", "prompt": "prompt:tokens=4", "prefix": "prefix:tokens=4"}


def spec(kind: str) -> str:
    return SMALL.get(kind, kind)


def bound(name: str) -> dict[str, torch.Tensor]:
    given = inputs(name)
    given.pop("decoder_input_ids", None)
    return {**given, "labels": torch.tensor([0, 1])}


def logits(model: nn.Module, name: str = "bert") -> torch.Tensor:
    with torch.no_grad():
        return model(**bound(name)).logits


def test_a_prefix_is_refused_where_peft_is_older_than_the_name_that_transformers_uses(monkeypatch):
    """transformers 5.24 calls `past_key_values` `cache`; peft 0.21.2 would find out in the first forward pass."""
    model, peft = classifier("gpt2"), pytest.importorskip("peft")
    monkeypatch.setattr(type(model.base_model), "forward", lambda self, input_ids=None, cache=None: None)
    monkeypatch.setattr(peft, "__version__", "0.21.2")
    with pytest.raises(ConfigError, match=r"peft 0\.21\.2 hands a prefix over .* transformers<5\.24 or a newer"):
        put_on(model, "prefix")


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "llama", "gpt2", "distilbert"])
@pytest.mark.parametrize("kind", PEFT)
def test_on_and_off(kind, name):
    if (kind, name) in {("shira", "gpt2"), ("super", "gpt2")}:
        pytest.skip("peft has no such layer for Conv1D")
    model = classifier(name)
    if kind == "prefix" and name in ("deberta-v2", "distilbert"):
        with pytest.raises(ConfigError, match=r"which .* does not take. prompt and ptuning put"):
            put_on(model, kind)
        return
    before, out = trace(model), logits(model, name)
    head = [n for n, _ in model.named_parameters() if n.startswith(("classifier", "score"))]
    adapted = put_on(model, spec(kind), seed=4, keep=head)
    assert adapted.names
    trainable = {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    prefix = "base_model." if KINDS[kind].wraps else ""
    assert {f"{prefix}{n}" for n in head} <= trainable
    assert trainable - {f"{prefix}{n}" for n in head} <= set(adapted.names)
    if not KINDS[kind].wraps and kind != "adalora":
        assert torch.equal(logits(adapted.model, name), out) or torch.allclose(
            logits(adapted.model, name), out, atol=1e-6
        )
    adapted.model(**bound(name)).loss.backward()
    adapted.remove()
    for parameter in model.parameters():
        parameter.grad = None
    assert trace(model) == before
    assert torch.equal(logits(model, name), out)


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_it_computes_the_same(kind):
    model = classifier()
    names = set(model.state_dict())
    adapted = put_on(model, spec(kind), seed=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in adapted.names and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    out = logits(model)
    adapted.merge()
    assert set(model.state_dict()) == names
    assert torch.allclose(logits(model), out, atol=1e-4)


def test_what_is_no_weight_cannot_be_merged():
    for kind in ("prompt", "pfeiffer"):
        adapted = put_on(classifier(), kind)
        with pytest.raises(
            ConfigError, match=r"which no change of the base's weights can stand for\. These can be merged: lora"
        ):
            adapted.merge()
        adapted.remove()


def test_peft_that_refuses_leaves_the_model_alone():
    model = classifier("gpt2")
    before = trace(model)
    with pytest.raises(ConfigError, match=r"peft cannot put shira.*Conv1D"):
        put_on(model, "shira:r=2")
    assert trace(model) == before


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'selectune\[peft\]'"):
        put_on(classifier(), "lora")


def counted(name: str, text: str, config: dict) -> int:
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **config))
        return put_on(model, text).size


def test_sizes_of_the_papers():
    """Hu et al. 2024 and arXiv 2408.14470: r (m + n) a matrix."""
    llama = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    targets = "targets=query+key+value+ffn1+ffn2"
    assert counted("llama", f"lora:r=32,{targets}", llama) == 32 * 32 * (3 * 8192 + 2 * 15104) == 56_098_816
    assert counted("llama", f"lora:r=2,{targets}", llama) == 3_506_176
    deberta = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    assert counted("deberta-v2", "lora:r=8", {**deberta, "hidden_size": 768, "num_hidden_layers": 12,
                   "num_attention_heads": 12, "intermediate_size": 3072}) == 1_327_104  # fmt: skip
    bert = {"num_hidden_layers": 12}
    site = 2 * 768 * 48 + 48 + 768
    assert counted("bert", "pfeiffer:reduction=16", bert) == 12 * site
    assert counted("bert", "houlsby:reduction=16", bert) == 24 * site


def test_a_lora_that_is_drawn():
    model = classifier()
    out = logits(model)
    drawn = put_on(model, "lora:init=normal", seed=1)
    assert torch.allclose(logits(model), out, atol=0.1)
    b = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert all(bool((p != 0).all()) for p in b)
    assert 0.015 < torch.cat([p.flatten() for p in b]).std() < 0.025
    drawn.remove()
    assert torch.equal(logits(model), out)


def test_targets():
    model = classifier()
    assert put_on(model, "lora:r=1,targets=query+value").size == 2 * 2 * 32
    model = classifier()
    adapted = put_on(model, "lora:r=1,targets=linears")
    assert any("pooler" in name for name in adapted.names)
    with pytest.raises(ConfigError, match="targets=gate names no module of BertForSequenceClassification, which has"):
        put_on(classifier(), "lora:targets=gate")
    given = put_on(make("bert"), "lora:r=1", names=["encoder.layer.0.output.dense"])
    assert given.size == 48


def test_adalora_moves_ranks_and_adds_its_penalty():
    model = classifier()
    adapted = put_on(model, "adalora:r=2,start=4,orth=0.5", seed=1, steps=20)
    matrices = [m for m in model.modules() if hasattr(m, "lora_E")]
    grams = [g for m in matrices for g in (
        m.lora_A.default @ m.lora_A.default.T, m.lora_B.default.T @ m.lora_B.default)]  # fmt: skip
    penalty = sum(torch.linalg.norm(g - torch.eye(4)) for g in grams) / len(grams)
    given = bound("bert")
    plain = torch.nn.functional.cross_entropy(logits(model), given["labels"])
    assert torch.allclose(model(**given).loss, plain + 0.5 * penalty, atol=1e-5)
    assert adapted.after_step is not None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(20):
        model(**given).loss.backward()
        optimizer.step()
        adapted.after_step(step)
        optimizer.zero_grad()
    kept = sum(int((m.lora_E.default != 0).sum()) for m in matrices)
    assert kept == 2 * len(matrices) < 4 * len(matrices)
    assert put_on(classifier(), "adalora").after_step is None  # without steps ranks stay
    with pytest.raises(ConfigError, match="leave none of 10 steps"):
        put_on(classifier(), "adalora:begin=0.5,end=0.5", steps=10)
    with pytest.raises(ConfigError, match="start=4 is below r=8"):
        put_on(classifier(), "adalora:start=4")


def test_loraplus_has_two_rates():
    model = classifier()
    put_on(model, "loraplus", keep=("classifier.weight",))
    optimizer = peers.two_rates(model, 1e-4, 16.0, 0.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1.6e-3 if "lora_B" in name else 1e-4)


def test_specs():
    assert parse("lora").options == {"r": 8, "alpha": 8.0, "dropout": 0.0, "targets": "all", "init": "zero"}
    assert parse("lora:r=16, alpha=32").options["alpha"] == 32.0
    assert parse("prefix:projection=true").options["projection"] is True
    assert parse(str(parse("pfeiffer:reduction=4"))) == parse("pfeiffer:reduction=4")
    assert all(str(parse(kind)) for kind in KINDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorra", "Unknown adapter 'lorra'. Known: lora, dora"),
        ("lora:", "options are written name=value"),
        ("lora:r", "options are written name=value.*'r' is not"),
        ("lora:r=8,r=4", "given twice"),
        ("lora:rank=8", "lora takes no option rank. It takes: r, alpha"),
        ("lora:r=0", "lora: r=0 is not allowed; r is an int from 1"),
        ("lora:r=8.5", "r=8.5 is not allowed"),
        ("lora:r=100000", "an int from 1 to 65,536"),
        ("lora:dropout=1", "dropout"),
        ("lora:alpha=nan", "alpha=nan"),
        ("lora:targets=query+keys", "roles joined by"),
        ("pfeiffer:init=bert", "one of normal, zero"),
        ("ia3:r=2", "ia3 takes no option r. It takes: none"),
    ],
)
def test_specs_that_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
