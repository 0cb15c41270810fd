"""One tiny model of each architecture with a role map, and comparisons of a model with what it was before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BERT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40,
    "max_position_embeddings": 32,
}  # fmt: skip
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {
    "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "d_kv": 8, "vocab_size": 40, "pad_token_id": 0,
    "decoder_start_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": {**_BERT, "embedding_size": 16},
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA,
    "distilbert": {
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40, "max_position_embeddings": 32,
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    },
    "t5": _T5,
    "t5-gated": {**_T5, "feed_forward_proj": "gated-gelu"},
    "bart": _BART,
    "mbart": _BART,
}  # fmt: skip
BOTH = ("t5", "t5-gated", "bart", "mbart")  # encoder and decoder


def make(name: str, seed: int = 0, auto: str = "AutoModel", **more: Any) -> Any:
    """The bare model, or with a head: `auto="AutoModelForSequenceClassification"`."""
    import transformers

    config = transformers.AutoConfig.for_model(name.removesuffix("-gated"), **{**CONFIGS[name], **more})
    torch.manual_seed(seed)
    return getattr(transformers, auto).from_config(config).eval()


def classifier(name: str = "bert", seed: int = 0, **more: Any) -> Any:
    return make(name, seed, "AutoModelForSequenceClassification", **more)


def inputs(name: str) -> dict[str, Tensor]:
    ids = torch.arange(3, 15).reshape(2, 6)
    both = {"decoder_input_ids": ids.flip(0)} if name in BOTH else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **both}


@torch.no_grad()
def hidden(model: nn.Module, name: str) -> Tensor:
    return model(**inputs(name)).last_hidden_state


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that an adapter may leave on a model: modules, hooks, attributes, bits, requires_grad."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        ],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "bits": {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
    }
