"""Configs of the models that are measured, by name: plain values, so that they can be listed without torch."""

from __future__ import annotations

from typing import Any

_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512}
_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "tie_word_embeddings": True}
_LARGE = {**_LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_BERT, "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 128,
    },
    # What every worker runs before anything is measured: one layer, wide enough that kernels are chosen as usual.
    "rehearsal": {
        **_BERT, "vocab_size": 512, "hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 6,
        "intermediate_size": 1536, "max_position_embeddings": 64,
    },
    "bert-6l": {
        **_BERT, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072,
    },
    "minilm": {
        **_BERT, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
    },
    "deberta-v3-base": {
        "model_type": "deberta-v2", "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 0,
        "relative_attention": True, "position_buckets": 256, "max_relative_positions": -1, "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "layer_norm_eps": 1e-7,
        "pooler_dropout": 0, "pooler_hidden_act": "gelu", "pooler_hidden_size": 768, "legacy": True,
    },
    "llama-tiny": {
        **_LLAMA, "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 384,
    },
    "llama-1b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192,
    },
    # Of a size to be planned. Shapes of Llama 2 (Touvron and others 2023, arXiv 2307.09288).
    "llama-7b": {
        **_LARGE, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
    },
    "llama-70b": {
        **_LARGE, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
}  # fmt: skip
