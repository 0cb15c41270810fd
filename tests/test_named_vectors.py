"""Literal vectors of the scores that are read before training, each through the whole engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import selectune as st


def one(values):
    """A model of one weight tensor (1, n) whose gradient is the input (1, n)."""
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def chosen(values, method, gradients):
    batches = [torch.tensor([g]) for g in gradients]
    tuner = st.attach(one(values), method, calibration=batches, loss=lambda m, x: m(x).sum())
    return tuner.support["weight"].tolist()


def test_snip():
    """methods 2.13: w = [.5, -1, 2, 0], g = [1, .2, -.1, 9]: scores [.5, .2, .2, 0]; keep 2: {0, 1}, tie by index."""
    w, g = [0.5, -1.0, 2.0, 0.0], [1.0, 0.2, -0.1, 9.0]
    assert st.scores.snip()(torch.tensor(w), torch.tensor(g)).tolist() == pytest.approx([0.5, 0.2, 0.2, 0.0])
    assert chosen(w, st.snip(2), [g]) == [0, 1]
    assert chosen(w, st.snip(1), [g]) == [0]


def test_speft():
    """The size of the summed gradient: gradients that differ in sign cancel, as in methods 2.6 for |g| of a batch."""
    gradients = [[1.0, -3.0, 0.5], [1.0, 3.0, 0.5]]
    assert chosen([0.1, 0.2, 0.3], st.speft(1, batches=None), gradients) == [0]
    assert chosen([0.1, 0.2, 0.3], st.speft(2, batches=None), gradients) == [0, 2]


def test_child_tuning_d():
    """methods 2.11: gradients [3, 0, 1], [1, 0, 2]: F = [5, 0, 2.5]; p = 1/3 -> {0}. Clipping off."""
    gradients = [[3.0, 0.0, 1.0], [1.0, 0.0, 2.0]]
    score = st.scores.fisher_batches(clip=None)
    assert (sum(score(torch.zeros(3), torch.tensor(g)) for g in gradients) / 2).tolist() == [5.0, 0.0, 2.5]
    assert chosen([0.1, 0.2, 0.3], st.child_tuning_d(1 / 3, clip=None), gradients) == [0]
    assert chosen([0.1, 0.2, 0.3], st.child_tuning_d(2, clip=None), gradients) == [0, 2]


def test_child_tuning_d_clips_each_batch_before_it_squares():
    """[9, 0] and [0, 2] with norm 1 each tie, so the lower index wins; [9, 0], [0, 2], [0, 2] do not."""
    assert chosen([0.1, 0.2], st.child_tuning_d(1), [[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]]) == [1]
    assert chosen([0.1, 0.2], st.child_tuning_d(1, clip=None), [[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]]) == [0]


def test_movement_and_magnitude():
    """methods 2.15: W = [1, -2, .5], g = [-.3, -.1, .4]: S = [.3, -.2, -.2], keep {0}; largest {1}, smallest {2}."""
    w, g = [1.0, -2.0, 0.5], [-0.3, -0.1, 0.4]
    s = st.scores.movement()(torch.tensor(w), torch.tensor(g))
    assert s.tolist() == pytest.approx([0.3, -0.2, -0.2])
    assert chosen(w, st.movement(1, batches=1), [g]) == [0]
    assert chosen(w, st.movement(2, batches=1), [g]) == [0, 1]  # negative scores may be chosen; the tie by index
    assert chosen(w, st.magnitude(1), [g]) == [1]
    assert chosen(w, st.pafi(1), [g]) == [2]


def test_movement_is_a_window():
    """Opposite gradients cancel: the weight oscillates."""
    assert chosen([1.0, 1.0], st.movement(1, batches=None), [[-9.0, -1.0], [9.0, -1.0]]) == [1]


def test_gallop_is_static_d3_with_exponent_1():
    w, g = torch.tensor([0.1, 0.2, 2.0]), torch.tensor([0.5, 1.2, 4.0])
    assert st.gallop(1).score(w, g).tolist() == pytest.approx([5.0, 6.0, 2.0])
    assert st.gallop(1).schedule == st.static_d3(1).schedule


T5 = {"num_layers": 2, "num_decoder_layers": 2, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "vocab_size": 32}
BART = {
    "encoder_layers": 2, "decoder_layers": 2, "d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 16,
}  # fmt: skip


def test_xattn_on_t5():
    """methods 2.14: per decoder layer q, k, v, o and the layer norm; none in the encoder."""
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    names = [t.name for t in st.xattn().scope.find(model).whole]
    sub = "decoder.block.{}.layer.1.{}.weight"
    parts = [f"EncDecAttention.{p}" for p in "qkvo"] + ["layer_norm"]
    assert sorted(names) == sorted(sub.format(i, p) for i in range(2) for p in parts)
    tuner = st.attach(model, st.xattn())
    assert tuner.trained == sum(p.numel() for p in tuner.parameters()) == 2 * (4 * 64 + 8)


def test_xattn_on_bart_and_on_a_model_without():
    transformers = pytest.importorskip("transformers")
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))
    names = {t.name for t in st.xattn().scope.find(model).whole}
    linears = {f"encoder_attn.{m}_proj.{p}" for m in ("q", "k", "v", "out") for p in ("weight", "bias")}
    norms = {f"encoder_attn_layer_norm.{p}" for p in ("weight", "bias")}
    assert names == {f"model.decoder.layers.{i}.{p}" for i in range(2) for p in linears | norms}
    with pytest.raises(st.errors.ScopeError, match="no decoder that attends to an encoder"):
        st.attach(one([1.0]), st.xattn())
    with pytest.raises(st.errors.ScopeError, match=r"unknown role '@head'. Known: @cross_attention"):
        st.Scope(include="@head")
