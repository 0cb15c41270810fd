"""Encoders of text."""

# ruff: noqa: E501 - a row a line

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zoo_kit import impossible
from zoo_models import TEXT, VOCABULARY, classes, hf, masked, plain_ids, tokens, unlabelled

RELATIVE = {"relative_attention": True, "max_relative_positions": 8, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}  # fmt: skip

TWICE = {"reentrant": impossible("second time")}  # its layers share the relative positions, a graph of their own


def layout(draw: torch.Generator) -> dict[str, Tensor]:
    return {**masked(draw), "bbox": torch.randint(0, 30, (2, 8, 2), generator=draw).sort(1).values.repeat(1, 1, 2)}


def spans(draw: torch.Generator) -> dict[str, Tensor]:
    return {**unlabelled(draw), "start_positions": tokens(draw, 2, below=7), "end_positions": tokens(draw, 2, below=8)}


def bytes_of(draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, VOCABULARY, (2, 16), generator=draw)}


def long(draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": tokens(draw, 2, 16), "labels": tokens(draw, 2, 16)}


def big(kind: str) -> dict[str, Any]:
    return {**TEXT, "attention_type": kind, "block_size": 2, "num_random_blocks": 1}


ROWS = [
    hf("bert", "BertConfig", "BertForMaskedLM", TEXT, masked, short=True),
    hf("bert for sentences", "BertConfig", "BertForSequenceClassification", TEXT, classes),
    hf("roberta", "RobertaConfig", "RobertaForMaskedLM", TEXT, masked),
    hf("xlm-roberta", "XLMRobertaConfig", "XLMRobertaForTokenClassification", {**TEXT, "num_labels": 64}, masked),
    hf("electra", "ElectraConfig", "ElectraForMaskedLM", {**TEXT, "embedding_size": 12}, masked, short=True),
    hf(
        "distilbert", "DistilBertConfig", "DistilBertForMaskedLM",
        {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 64},
        masked,
    ),
    hf("deberta", "DebertaConfig", "DebertaForMaskedLM", {**TEXT, **RELATIVE}, masked, short=True),
    hf("deberta-v2", "DebertaV2Config", "DebertaV2ForMaskedLM", {**TEXT, **RELATIVE, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}, masked, expects=TWICE),
    hf("albert", "AlbertConfig", "AlbertForMaskedLM", {**TEXT, "embedding_size": 12}, masked),
    hf("mpnet", "MPNetConfig", "MPNetForMaskedLM", TEXT, masked),
    hf("modernbert", "ModernBertConfig", "ModernBertForMaskedLM", {**TEXT, "cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2, "local_attention": 4}, masked, short=True),
    hf("camembert", "CamembertConfig", "CamembertForQuestionAnswering", TEXT, spans),
    hf("mobilebert", "MobileBertConfig", "MobileBertForMaskedLM", {**TEXT, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8, "num_feedforward_networks": 2}, masked),
    hf("squeezebert", "SqueezeBertConfig", "SqueezeBertForMaskedLM", {**TEXT, "embedding_size": 16, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2}, masked),
    hf("convbert", "ConvBertConfig", "ConvBertForMaskedLM", {**TEXT, "num_attention_heads": 4, "embedding_size": 12, "conv_kernel_size": 3, "num_groups": 1}, masked),
    hf("rembert", "RemBertConfig", "RemBertForMaskedLM", {**TEXT, "input_embedding_size": 8, "output_embedding_size": 12}, masked),
    hf("roformer", "RoFormerConfig", "RoFormerForMaskedLM", {**TEXT, "embedding_size": 16}, masked),
    hf("funnel", "FunnelConfig", "FunnelForMaskedLM", {"vocab_size": 64, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24}, masked),
    hf("fnet", "FNetConfig", "FNetForMaskedLM", {**TEXT, "use_tpu_fourier_optimizations": False}, plain_ids, output="logits", expects={"bf16": impossible("BFloat16")}),
    hf("nystromformer", "NystromformerConfig", "NystromformerForMaskedLM", {**TEXT, "num_landmarks": 4, "segment_means_seq_len": 16}, long, expects={"bf16": impossible("expected scalar type")}),
    hf("longformer", "LongformerConfig", "LongformerForMaskedLM", {**TEXT, "attention_window": 4}, long, short=True),
    hf("big bird, full", "BigBirdConfig", "BigBirdForMaskedLM", big("original_full"), masked),
    hf("big bird, sparse", "BigBirdConfig", "BigBirdForMaskedLM", big("block_sparse"), lambda d: {"input_ids": tokens(d, 1, 32), "labels": tokens(d, 1, 32)}),
    hf("xlm", "XLMConfig", "XLMWithLMHeadModel", {"vocab_size": 64, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64, "n_langs": 1, "pad_index": 1}, masked),
    hf("xlnet", "XLNetConfig", "XLNetLMHeadModel", {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}, masked),
    hf("dpr", "DPRConfig", "DPRQuestionEncoder", {**TEXT, "projection_dim": 8}, unlabelled, output="pooler_output"),
    hf("layoutlm", "LayoutLMConfig", "LayoutLMForMaskedLM", {**TEXT, "max_2d_position_embeddings": 64}, layout),
    hf("lilt", "LiltConfig", "LiltForTokenClassification", {**TEXT, "hidden_size": 24, "max_2d_position_embeddings": 64, "num_labels": 64}, layout),
    hf("esm", "EsmConfig", "EsmForMaskedLM", {**TEXT, "mask_token_id": 4, "position_embedding_type": "rotary"}, masked),
    hf("perceiver", "PerceiverConfig", "PerceiverForMaskedLM", {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 16, "qk_channels": 16, "v_channels": 16}, lambda d: {"inputs": tokens(d, 2, 16), "labels": tokens(d, 2, 16)}),
    hf("reformer", "ReformerConfig", "ReformerForMaskedLM", {"vocab_size": 64, "hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2, "feed_forward_size": 24, "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_hashes": 1, "num_buckets": 2, "axial_pos_embds_dim": [8, 8], "axial_pos_shape": [4, 4], "max_position_embeddings": 16, "hash_seed": 0, "is_decoder": False}, long),
    hf("t5 encoder", "T5Config", "T5EncoderModel", {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}, unlabelled, output="last_hidden_state"),
    hf("nomic bert", "NomicBertConfig", "NomicBertModel", TEXT, unlabelled, output="last_hidden_state"),
    hf("eurobert", "EuroBertConfig", "EuroBertForMaskedLM", TEXT, masked),
]  # fmt: skip
