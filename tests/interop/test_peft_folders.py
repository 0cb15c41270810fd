"""Adapters of peft: out, so that stock peft loads them, and in, from what stock peft saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interop_kit import load, logits, make_llama, train
from tiny_kit import make_model
from torch import nn

import selectune as st
from selectune.adapters import parse, put_on
from selectune.delta import Delta
from selectune.errors import ConfigError, DeltaError, DeltaFormatError, NothingTrainedError
from selectune.interop import bridges
from selectune.models.adapted import method_of, with_adapter
from selectune.models.bases import load_model
from selectune.models.restore import Source
from selectune.tasks import Head

peft = pytest.importorskip("peft")
# of trainable tokens on a tied embedding; peft ties the rows all the same
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tied") / "base", tied=True)


def out_and_in(base: Path, folder: Path, scope: Any, budget: int = 150) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits with the delta, logits of stock peft's model from the exported folder, and what the export said."""
    model = load(base)
    delta = train(model, st.random(budget=budget, scope=scope))
    delta.save(folder / "run")
    told = bridges.export("peft", Source(str(base)), folder / "run", folder / "out")
    delta.apply(model)
    found = peft.PeftModel.from_pretrained(load(base), folder / "out").eval()
    back = bridges.import_delta("peft", folder / "out", Source(str(base)))
    again = load(base)
    back.apply(again)
    assert torch.allclose(logits(again), logits(found), rtol=0, atol=1e-6)
    return logits(model), logits(found), told


def test_linear_weights_go_out_as_super_tuning(llama, tmp_path):
    ours, theirs, told = out_and_in(llama, tmp_path, ["model.layers*proj.weight"])
    assert told["peft_type"] == "SUPERTUNING"
    assert told["whole"] == [] and told["padding"] > 0  # noqa: PT018
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_what_is_no_linear_weight_goes_out_as_whole_modules(llama, tmp_path):
    """Norms, biases, the embedding; "norm" ends the names of other norms, and peft would take those as well."""
    ours, theirs, told = out_and_in(llama, tmp_path, ["*"], 2000)
    assert {"model.norm", "model.embed_tokens", "model.layers.0.self_attn.q_proj"} <= set(told["whole"])
    assert told["linear"] > 0
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["llama", "tied"])
def test_rows_of_an_embedding_go_out_as_trainable_tokens(base, tmp_path, request):
    ours, theirs, told = out_and_in(request.getfixturevalue(base), tmp_path, ["*embed_tokens*"], 20)
    assert told["peft_type"] == "TRAINABLE_TOKENS"
    assert torch.equal(ours, theirs)


def test_half_precision_says_how_far_it_is(tmp_path):
    base = make_llama(tmp_path / "base", dtype=torch.bfloat16)
    delta = train(load(base), st.random(budget=400, scope=["model.layers*proj.weight"]))
    delta.save(tmp_path / "run")
    told = bridges.export("peft", Source(str(base)), tmp_path / "run", tmp_path / "out")
    model, found = load(base), peft.PeftModel.from_pretrained(load(base), tmp_path / "out")
    delta.apply(model)
    merged = found.merge_and_unload()
    pairs = list(zip(model.parameters(), merged.parameters(), strict=True))
    assert sum(int((a != b).sum()) for a, b in pairs) == told["inexact"]
    assert max(float((a.double() - b.double()).abs().max().detach()) for a, b in pairs) == told["largest_error"]


def test_refusals_say_what_peft_cannot_hold(llama, tied, tmp_path):
    train(load(tied), st.random(budget=300)).save(tmp_path / "tied")
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight: a tied tensor"):
        bridges.export("peft", Source(str(tied)), tmp_path / "tied", tmp_path / "out")
    train(load(llama), st.random(budget=30, scope=["*norm*"])).save(tmp_path / "norms")
    with pytest.raises(ConfigError, match="needs a change in the weight of a linear layer"):
        bridges.export("peft", Source(str(llama)), tmp_path / "norms", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_delta_on_an_adapter_is_refused(llama, tmp_path):
    model = load(llama)
    adapted = put_on(model, "lora:r=2", seed=0)
    train(adapted.model, st.random(budget=30)).save(tmp_path / "run")
    for kind in ("vllm", "safetensors-diff"):
        with pytest.raises(ConfigError, match=f"trained on lora, which {kind} does not hold"):
            bridges.export(kind, Source(str(llama)), tmp_path / "run", tmp_path / "out")


def test_an_adapter_that_peft_does_not_have_is_refused(llama, tmp_path):
    adapted = put_on(load(llama), "pfeiffer:reduction=4", seed=0)
    train(adapted.model, st.random(budget=30)).save(tmp_path / "run")
    for kind in ("peft", "vllm", "safetensors-diff"):
        with pytest.raises(ConfigError, match=r"trained on pfeiffer[;,].*selectune eval uses it as it is") as told:
            bridges.export(kind, Source(str(llama)), tmp_path / "run", tmp_path / "out")
        assert "merge" not in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", ["lora:r=2", "dora:r=2", "ia3"])
@pytest.mark.parametrize("budget", [30, None], ids=["30 of it", "all of it"])
def test_stock_peft_loads_the_adapter_of_a_delta(spec, budget, llama, tmp_path):
    model = load(llama)
    base = logits(model)
    adapted = put_on(model, spec, seed=0)
    method = method_of(adapted.spec) if budget is None else st.random(budget=budget)
    train(adapted.model, method).save(tmp_path / "run")
    told = bridges.export("peft", Source(str(llama)), tmp_path / "run", tmp_path / "out")
    found = peft.PeftModel.from_pretrained(load(llama), tmp_path / "out")
    with st.load(tmp_path / "run").applied(adapted.model):
        wanted = logits(adapted.model)
    assert (logits(found) - wanted).abs().max() <= 1e-5
    assert (wanted - base).abs().max() > 1e-3
    assert told["peft_type"] == ("IA3" if spec == "ia3" else "LORA")


def test_a_head_beside_an_adapter_is_saved_as_a_module(tmp_path):
    base = make_model(tmp_path / "base")
    loaded = load_model(str(base), Head("BertForSequenceClassification", 3), 0)
    adapted = with_adapter(loaded, parse("lora:r=2"), 0, None)
    head = st.Scope(include=["*lora_*"], train_fully=["*classifier*"])
    delta = train(adapted.model, st.random(budget=30, scope=head))
    info = delta.info
    Delta(delta.patches, delta.dense, {**info, "base": {**info["base"], "seed": 0}}).save(tmp_path / "run")
    told = bridges.export("peft", Source(str(base)), tmp_path / "run", tmp_path / "out")
    assert told["whole"] == ["classifier"]
    plain = load_model(str(base), Head("BertForSequenceClassification", 3), 1).model  # another head, which is replaced
    found = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    with delta.applied(adapted.model):
        assert (logits(found) - logits(adapted.model)).abs().max() <= 1e-5


def without_pooler(folder: Path) -> Path:
    """A BERT trunk whose pooler is drawn as its head is."""
    from transformers import BertModel

    make_model(folder)
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("on", [None, "lora:r=2"])
@pytest.mark.parametrize("fully", [[], ["*classifier*"]], ids=["drawn", "trained"])
def test_a_head_that_no_checkpoint_holds_goes_along(fully, on, tmp_path):
    """Also the pooler, which no training changes: the base of peft's user has drawn others."""
    base = without_pooler(tmp_path / "base")

    def drawn(seed: int) -> Any:
        return load_model(str(base), Head("BertForSequenceClassification", 3), seed)

    loaded = drawn(0) if on is None else with_adapter(drawn(0), parse(on), 0, None)
    scope = st.Scope(include=["*query.weight" if on is None else "*lora_*"], train_fully=fully)
    delta = train(loaded.model, st.random(budget=30, scope=scope))
    Delta(delta.patches, delta.dense, {**delta.info, "base": {**delta.info["base"], "seed": 0}}).save(tmp_path / "run")
    told = bridges.export("peft", Source(str(base)), tmp_path / "run", tmp_path / "out")
    assert told["whole"] == ["bert.pooler.dense", "classifier"]
    with delta.applied(loaded.model):
        wanted = logits(loaded.model)
    for seed in (1, 2):
        found = peft.PeftModel.from_pretrained(drawn(seed).model, tmp_path / "out").eval()
        assert (logits(found) - wanted).abs().max() <= 1e-5


def test_a_drawn_head_that_peft_cannot_hold_is_refused(tmp_path):
    base = without_pooler(tmp_path / "base")
    loaded = load_model(str(base), Head("BertForSequenceClassification", 3), 0)
    train(loaded.model, st.random(budget=30, scope=["*word_embeddings*"])).save(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"whole modules \(bert\.embeddings\.word_embeddings, bert\.pooler\.dense, clas"
    ):
        bridges.export("peft", Source(str(base)), tmp_path / "run", tmp_path / "out")
    adapted = with_adapter(loaded, parse("lora:r=2,targets=linears"), 0, None)
    train(adapted.model, st.random(budget=30, scope=["*lora_*"])).save(tmp_path / "lora")
    with pytest.raises(ConfigError, match="in no checkpoint, so it is drawn from a seed, and the lora lies on it"):
        bridges.export("peft", Source(str(base)), tmp_path / "lora", tmp_path / "out")


def peft_saved(base: Path, folder: Path, config: Any) -> Any:
    """What peft saves after its adapter got random values; returns the merged model."""
    model = peft.get_peft_model(load(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3 if "lora_" not in name else 0.1)
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (lambda: peft.ShiraConfig(r=1, target_modules=["q_proj", "down_proj"]), 4),
        (lambda: peft.SupertuningConfig(sparsity=0.9, target_modules=["q_proj"]), 2),
        (lambda: peft.SupertuningConfig(sparsity=0.9, target_modules=["q_proj"], modules_to_save=["lm_head"]), 3),
        (lambda: peft.TrainableTokensConfig(token_indices=[3, 7], target_modules=["embed_tokens"]), 1),
    ],
    ids=["shira", "super-tuning", "with a module", "trainable tokens"],
)
def test_what_peft_saved_comes_in_bit_for_bit(config, tensors, llama, tmp_path):
    merged = peft_saved(llama, tmp_path / "adapter", config())
    delta = bridges.import_delta("peft", tmp_path / "adapter", Source(str(llama)))
    assert len(delta.patches) == tensors
    model = load(llama)
    delta.apply(model, full=True)
    theirs = dict(merged.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())
    delta.save(tmp_path / "imported")
    assert st.load(tmp_path / "imported") == delta


def test_other_adapters_and_folders_are_refused(llama, tmp_path):
    peft_saved(llama, tmp_path / "lora", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="holds an adapter of kind 'LORA'"):
        bridges.import_delta("peft", tmp_path / "lora", Source(str(llama)))
    peft_saved(llama, tmp_path / "supra", peft.SupertuningConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="low-rank part"):
        bridges.import_delta("peft", tmp_path / "supra", Source(str(llama)))
    with pytest.raises(DeltaError, match="no such file or folder"):
        bridges.import_delta("peft", tmp_path / "nothing", Source(str(llama)))
    with pytest.raises(DeltaFormatError, match=r"adapter_config\.json"):
        bridges.import_delta("peft", llama, Source(str(llama)))
    peft.get_peft_model(load(llama), peft.ShiraConfig(r=1, target_modules=["q_proj"])).save_pretrained(tmp_path / "new")
    with pytest.raises(NothingTrainedError, match="changes no scalar"):
        bridges.import_delta("peft", tmp_path / "new", Source(str(llama)))
    peft_saved(llama, tmp_path / "shira", peft.ShiraConfig(r=1, target_modules=["q_proj"]))
    wide = make_llama(tmp_path / "narrow", seed=2)
    (tmp_path / "shira" / "adapter_model.safetensors").write_bytes(b"no file of tensors")
    with pytest.raises(DeltaFormatError, match="is no safetensors file"):
        bridges.import_delta("peft", tmp_path / "shira", Source(str(wide)))
