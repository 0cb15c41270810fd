"""Encoder-decoders of text."""

# ruff: noqa: E501 - a row a line

from __future__ import annotations

import torch
from torch import Tensor
from zoo_kit import SETTINGS, refused
from zoo_models import VOCABULARY, hf, pairs, tokens

CASTS = dict.fromkeys(
    (s for s in SETTINGS if s != "attention"), refused("was cast from")
)  # forward casts its router's weights to float32

BART = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64, "pad_token_id": 1, "decoder_start_token_id": 2}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 1, "decoder_start_token_id": 1}  # fmt: skip


def long(draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": tokens(draw, 2, 16), "labels": tokens(draw, 2, 6)}


ROWS = [
    hf("t5", "T5Config", "T5ForConditionalGeneration", T5, pairs, short=True),
    hf("mt5, gated", "MT5Config", "MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, pairs),
    hf("umt5", "UMT5Config", "UMT5ForConditionalGeneration", T5, pairs),
    hf("longt5", "LongT5Config", "LongT5ForConditionalGeneration", {**T5, "local_radius": 3, "encoder_attention_type": "transient-global", "global_block_size": 4}, long),
    hf("switch transformers", "SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0, "expert_capacity": 64}, pairs, expects=CASTS),
    hf("bart", "BartConfig", "BartForConditionalGeneration", BART, pairs, short=True),
    hf("mbart", "MBartConfig", "MBartForConditionalGeneration", BART, pairs),
    hf("pegasus", "PegasusConfig", "PegasusForConditionalGeneration", BART, pairs),
    hf("marian", "MarianConfig", "MarianMTModel", BART, pairs),
    hf("m2m100", "M2M100Config", "M2M100ForConditionalGeneration", BART, pairs),
    hf("blenderbot", "BlenderbotConfig", "BlenderbotForConditionalGeneration", BART, pairs),
    hf("nllb-moe", "NllbMoeConfig", "NllbMoeForConditionalGeneration", {**BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64, "moe_token_dropout": 0.0}, pairs, expects=CASTS),
    hf("led", "LEDConfig", "LEDForConditionalGeneration", {**{k: v for k, v in BART.items() if k != "max_position_embeddings"}, "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}, long),
    hf("bigbird pegasus", "BigBirdPegasusConfig", "BigBirdPegasusForConditionalGeneration", {**BART, "attention_type": "original_full"}, pairs),
    hf("pegasus-x", "PegasusXConfig", "PegasusXForConditionalGeneration", {**BART, "block_size": 4, "num_global_tokens": 4}, long),
    hf("prophetnet", "ProphetNetConfig", "ProphetNetForConditionalGeneration", {"vocab_size": VOCABULARY, "hidden_size": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "max_position_embeddings": 64, "ngram": 2, "num_buckets": 8, "relative_max_distance": 16, "pad_token_id": 1, "disable_ngram_loss": False}, lambda d: {"input_ids": tokens(d, 2, 8), "labels": tokens(d, 2, 6)}),
    hf("plbart", "PLBartConfig", "PLBartForConditionalGeneration", BART, pairs),
]  # fmt: skip
