"""Decoders: attention, experts, state spaces."""

# ruff: noqa: E501 - a row a line

from __future__ import annotations

from typing import Any

from zoo_models import TEXT, causal, hf, masked

GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
OLD = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": False}
LATENT = {**TEXT, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16, "n_shared_experts": 1}  # fmt: skip
STATES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip


def llama_like(name: str, prefix: str, options: dict[str, Any] = GROUPED, **more: Any):
    return hf(name, f"{prefix}Config", f"{prefix}ForCausalLM", options, causal, **more)


ATTENTION = [
    hf("gpt2", "GPT2Config", "GPT2LMHeadModel", OLD, causal, short=True),
    hf("gpt-neo", "GPTNeoConfig", "GPTNeoForCausalLM", {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4, "intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3}, causal),
    hf("gpt-neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", {**TEXT, "rotary_pct": 0.5}, causal),
    hf("gpt-j", "GPTJConfig", "GPTJForCausalLM", {**OLD, "rotary_dim": 4, "bos_token_id": 2, "eos_token_id": 3}, causal),
    hf("gpt-bigcode", "GPTBigCodeConfig", "GPTBigCodeForCausalLM", {**OLD, "bos_token_id": 2, "eos_token_id": 3}, causal),
    hf("codegen", "CodeGenConfig", "CodeGenForCausalLM", {**OLD, "n_embd": 32, "n_head": 4, "rotary_dim": 4, "bos_token_id": 2, "eos_token_id": 3}, causal),
    hf("opt", "OPTConfig", "OPTForCausalLM", {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 12}, causal, short=True),
    hf("bloom", "BloomConfig", "BloomForCausalLM", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2}, masked),
    hf("mpt", "MptConfig", "MptForCausalLM", {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}, masked),
    hf("falcon", "FalconConfig", "FalconForCausalLM", {**TEXT, "alibi": False, "multi_query": True, "parallel_attn": True}, masked),
    hf("ctrl", "CTRLConfig", "CTRLLMHeadModel", {"vocab_size": 64, "n_positions": 64, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2}, causal),
    hf("openai-gpt", "OpenAIGPTConfig", "OpenAIGPTLMHeadModel", OLD, causal),
    hf("bert as a decoder", "BertConfig", "BertLMHeadModel", {**TEXT, "is_decoder": True}, masked),
    llama_like("llama", "Llama", short=True),
    llama_like("llama, tied", "Llama", {**GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    llama_like("mistral", "Mistral", {**GROUPED, "sliding_window": 4}),
    llama_like("qwen2", "Qwen2", {**GROUPED, "tie_word_embeddings": True}),
    llama_like("qwen3", "Qwen3"),
    llama_like("gemma", "Gemma"),
    llama_like("gemma2", "Gemma2", {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    hf("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}, causal, short=True),
    llama_like("phi", "Phi", {**TEXT, "partial_rotary_factor": 0.5}),
    llama_like("phi3", "Phi3", {**GROUPED}),
    llama_like("smollm3", "SmolLM3"),
    llama_like("olmo2", "Olmo2"),
    llama_like("stablelm", "StableLm"),
    llama_like("starcoder2", "Starcoder2"),
    llama_like("cohere", "Cohere"),
    llama_like("granite", "Granite"),
    llama_like("persimmon", "Persimmon", TEXT),
    llama_like("nemotron", "Nemotron"),
    llama_like("glm", "Glm", {**GROUPED, "partial_rotary_factor": 0.5}),
]  # fmt: skip

ROUTED = [
    llama_like("mixtral", "Mixtral", {**EXPERTS, "num_local_experts": 4}, short=True),
    llama_like("qwen2-moe", "Qwen2Moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}),
    llama_like("qwen3-moe", "Qwen3Moe", {**EXPERTS, "num_experts": 4, "norm_topk_prob": True}),
    llama_like("olmoe", "Olmoe", {**EXPERTS, "num_experts": 4}),
    llama_like("deepseek-v2", "DeepseekV2", {**LATENT, "topk_method": "group_limited_greedy"}),
    llama_like("deepseek-v3", "DeepseekV3", LATENT),
    llama_like("phimoe", "Phimoe", {**EXPERTS, "num_local_experts": 4}),
    llama_like("gpt-oss", "GptOss", {**EXPERTS, "num_local_experts": 4, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    llama_like("granite-moe", "GraniteMoe", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    hf("jetmoe", "JetMoeConfig", "JetMoeForCausalLM", {**TEXT, "num_key_value_heads": 1, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, causal),
    hf("dbrx", "DbrxConfig", "DbrxForCausalLM", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64, "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2}}, causal),
]  # fmt: skip

RECURRENT = [
    hf("mamba", "MambaConfig", "MambaForCausalLM", STATES, causal, short=True),
    hf("mamba2", "Mamba2Config", "Mamba2ForCausalLM", {**STATES, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}, causal),
    hf("falcon-mamba", "FalconMambaConfig", "FalconMambaForCausalLM", STATES, causal),
    hf("rwkv", "RwkvConfig", "RwkvForCausalLM", {"vocab_size": 64, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 64}, causal),
    hf("jamba", "JambaConfig", "JambaForCausalLM", {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}, causal),
    hf("bamba", "BambaConfig", "BambaForCausalLM", {**GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4}, causal),
    hf("recurrent gemma", "RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", {**GROUPED, "lru_width": 16, "attention_window_size": 4, "block_types": ["recurrent", "attention"]}, causal),
    hf("qwen3-next", "Qwen3NextConfig", "Qwen3NextForCausalLM", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}, causal),
    hf("lfm2", "Lfm2Config", "Lfm2ForCausalLM", {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, causal),
]  # fmt: skip

ROWS = [*ATTENTION, *ROUTED, *RECURRENT]
