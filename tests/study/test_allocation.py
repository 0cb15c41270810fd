"""Where a selection lies, on tiny models of five architectures: cells and other sum to B exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from selectune.errors import ConfigError
from selectune.study.analysis.allocation import allocate, kinds_of
from selectune.study.analysis.supports import Support

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL))


def deberta():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    more = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}  # as DeBERTa-v3
    return DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, **more))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=32))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, **ends))


# {parameter: its cell, or its kind}: one entry is put in each
PLACES = {
    bert: {
        "bert.encoder.layer.1.attention.self.query.weight": ("query", "1"),
        "bert.encoder.layer.0.attention.self.key.weight": ("key", "0"),
        "bert.encoder.layer.0.attention.self.value.weight": ("value", "0"),
        "bert.encoder.layer.1.attention.output.dense.weight": ("attention_output", "1"),
        "bert.encoder.layer.1.intermediate.dense.weight": ("ffn1", "1"),
        "bert.encoder.layer.0.output.dense.weight": ("ffn2", "0"),
        "bert.encoder.layer.0.output.dense.bias": "biases and norms",
        "bert.encoder.layer.0.output.LayerNorm.weight": "biases and norms",
        "bert.embeddings.word_embeddings.weight": "embeddings",
        "bert.pooler.dense.weight": "pooler",
        "classifier.weight": "head",
        "classifier.bias": "head",
    },
    deberta: {
        "deberta.encoder.layer.1.attention.self.query_proj.weight": ("query", "1"),
        "deberta.encoder.layer.1.attention.self.key_proj.weight": ("key", "1"),
        "deberta.encoder.layer.0.attention.self.value_proj.weight": ("value", "0"),
        "deberta.encoder.layer.0.attention.output.dense.weight": ("attention_output", "0"),
        "deberta.encoder.layer.0.intermediate.dense.weight": ("ffn1", "0"),
        "deberta.encoder.layer.1.output.dense.weight": ("ffn2", "1"),
        "deberta.encoder.rel_embeddings.weight": "embeddings",
        "pooler.dense.bias": "pooler",
        "classifier.weight": "head",
    },
    llama: {
        "model.layers.1.self_attn.q_proj.weight": ("query", "1"),
        "model.layers.1.self_attn.k_proj.weight": ("key", "1"),
        "model.layers.0.self_attn.v_proj.weight": ("value", "0"),
        "model.layers.0.self_attn.o_proj.weight": ("attention_output", "0"),
        "model.layers.0.mlp.gate_proj.weight": ("gate", "0"),
        "model.layers.0.mlp.up_proj.weight": ("ffn1", "0"),
        "model.layers.1.mlp.down_proj.weight": ("ffn2", "1"),
        "model.norm.weight": "biases and norms",
        "model.embed_tokens.weight": "embeddings",
        "lm_head.weight": "head",
    },
    t5: {
        "encoder.block.0.layer.0.SelfAttention.q.weight": ("query", "encoder 0"),
        "decoder.block.1.layer.0.SelfAttention.v.weight": ("value", "decoder 1"),
        "decoder.block.1.layer.1.EncDecAttention.k.weight": ("cross key", "decoder 1"),
        "decoder.block.0.layer.1.EncDecAttention.o.weight": ("cross attention_output", "decoder 0"),
        "encoder.block.1.layer.1.DenseReluDense.wi.weight": ("ffn1", "encoder 1"),
        "decoder.block.1.layer.2.DenseReluDense.wo.weight": ("ffn2", "decoder 1"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embeddings",
        "decoder.final_layer_norm.weight": "biases and norms",
        "shared.weight": "embeddings",
    },
    gpt2: {
        "transformer.h.0.attn.c_attn.weight": ("query", "0"),
        "transformer.h.1.attn.c_proj.weight": ("attention_output", "1"),
        "transformer.h.1.mlp.c_fc.weight": ("ffn1", "1"),
        "transformer.h.0.mlp.c_proj.weight": ("ffn2", "0"),
        "transformer.h.0.attn.c_attn.bias": "biases and norms",
        "transformer.wte.weight": "embeddings",  # tied with the head
        "transformer.wpe.weight": "embeddings",
    },
}


def sizes(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", PLACES, ids=lambda make: make.__name__)
def test_each_entry_lies_in_its_cell(make):
    model, places = make(), PLACES[make]
    empty = allocate(Support(sizes(model), {}), model)
    assert empty.total == 0
    for name, place in places.items():
        found = allocate(Support(sizes(model), {name: torch.tensor([0])}), model)
        hits = [cell for cell, count in found.counts.items() if count] + [k for k, n in found.other.items() if n]
        assert hits == [place], name
        assert found.sizes == empty.sizes


@pytest.mark.parametrize("make", PLACES, ids=lambda make: make.__name__)
def test_cells_and_other_are_the_budget_exactly(make):
    model, draw = make(), torch.Generator().manual_seed(0)
    entries = {n: (torch.rand(size, generator=draw) < 0.2).nonzero()[:, 0] for n, size in sizes(model).items()}
    support = Support(sizes(model), {n: flat for n, flat in entries.items() if flat.numel()})
    found = allocate(support, model)
    told = found.as_json()
    cells = sum(count or 0 for row in told["counts"] for count in row)
    assert cells + sum(told["other"].values()) == told["total"] == support.selected
    matrices = {name: size for name, size in sizes(model).items() if kinds_of(model)[name] == "rest"}
    assert sum(found.sizes.values()) == sum(matrices.values())
    whole = allocate(Support(sizes(model), {n: torch.arange(size) for n, size in sizes(model).items()}), model)
    assert {whole.share(cell) for cell in whole.counts} == {1.0}
    assert len(told["columns"]) == (4 if make is t5 else 2)


def test_the_fused_matrix_of_gpt2_is_taken_apart_by_columns():
    model = gpt2()
    weight = model.get_parameter("transformer.h.1.attn.c_attn.weight")
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[3, :16], mask[2, 16:20], mask[5, 47] = True, True, True
    name = "transformer.h.1.attn.c_attn.weight"
    found = allocate(Support(sizes(model), {name: mask.flatten().nonzero()[:, 0]}), model)
    counts = {row: found.counts[row, "1"] for row in ("query", "key", "value")}
    assert counts == {"query": 16, "key": 4, "value": 1}
    assert {found.sizes[row, "1"] for row in counts} == {16 * 16}
    assert "qkv" not in found.rows


def test_a_model_without_a_role_map():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="No role map is known for Sequential"):
        allocate(Support(sizes(model), {}), model)
    assert kinds_of(model) == {"0.weight": "embeddings", "1.weight": "rest", "1.bias": "biases and norms"}
