"""Architectures of transformers with two to three layers, each with a note on its special features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 96

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


_SSM = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_d_ssm": 64,
}


_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


_LATENT = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


_N = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Case:
    """An architecture: its `model_type`, settings in addition to SHAPE, and a note on its special features.

    common  True: SHAPE applies, whose names most architectures share
    causal  True: it has a causal language model; else its base model is written
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    common: bool = True
    causal: bool = True


CASES = (
    Case("qwen2", {"attention_dropout": 0.1}),
    Case("qwen3", {"head_dim": 8}),
    Case("llama", {"attention_dropout": 0.1}, "also Llama 3 and the R1 distillations"),
    Case("mistral", {"sliding_window": 4}, "sliding window"),
    Case("ministral", {"sliding_window": 4, "head_dim": 8}, "sliding window"),
    Case("gemma", {"head_dim": 8}),
    Case(
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
        "soft caps, sliding window",
    ),
    Case("gemma3_text", {"head_dim": 8, **_SLIDING}, "sliding window"),
    Case("phi", {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    Case("phi3", {"resid_pdrop": 0.1}),
    Case("gpt_neox", {"hidden_dropout": 0.1}),
    Case("gpt2", {**_N}),
    Case("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1, "layerdrop": 0.1}),
    Case("olmo", {}),
    Case("olmo2", {}),
    Case("olmo3", {**_SLIDING}, "sliding window"),
    Case("smollm3", {"no_rope_layers": [1, 0]}),
    Case("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.2, "attention_multiplier": 0.02}),
    Case("cohere", {"logit_scale": 0.25}),
    Case("cohere2", {**_SLIDING}, "sliding window"),
    Case("glm", {"head_dim": 8}),
    Case("glm4", {"head_dim": 8}),
    Case("stablelm"),
    Case("starcoder2", {"residual_dropout": 0.1, "embedding_dropout": 0.1, "sliding_window": 4}, "sliding window"),
    Case("nemotron"),
    Case(
        "exaone4",
        {"sliding_window": 4, "sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Case("seed_oss", {"head_dim": 8, "residual_dropout": 0.1}),
    Case("ernie4_5", {"head_dim": 8}),
    Case("hunyuan_v1_dense", {"head_dim": 8}),
    Case("apertus", {}),
    Case("arcee", {}),
    Case("helium", {"head_dim": 8}),
    Case("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 32}, "experts"),
    Case("qwen3_moe", {**_MOE, "head_dim": 8}, "experts"),
    Case("mixtral", {**_MOE, "router_jitter_noise": 0.1}, "experts"),
    Case("phimoe", {**_MOE, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1}, "experts"),
    Case("olmoe", {**_MOE}, "experts"),
    Case("granitemoe", {**_MOE, "logits_scaling": 8.0}, "experts"),
    Case("glm4_moe", {**_MOE, "head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, "experts"),
    Case("deepseek_v2", {**_MOE, **_LATENT}, "experts, latent attention"),
    Case("deepseek_v3", {**_MOE, **_LATENT, "first_k_dense_replace": 1}, "experts, latent attention"),
    Case("gpt_oss", {**_MOE, "head_dim": 8, **_SLIDING}, "experts, sinks, sliding window"),
    Case(
        "minimax",
        {**_MOE, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
        "linear attention",
    ),
    Case("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}, "convolutions"),
    Case(
        "qwen3_next",
        {
            **_MOE,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            **_DELTA,
            "shared_expert_intermediate_size": 32,
        },
        "linear attention",
    ),
    Case(
        "mamba",
        {"state_size": 8, "num_hidden_layers": 2, "vocab_size": VOCAB, "hidden_size": 32},
        "state-space layers",
        common=False,
    ),
    Case(
        "mamba2",
        {
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "num_hidden_layers": 2,
            "vocab_size": VOCAB,
            "hidden_size": 32,
        },
        "state-space layers",
        common=False,
    ),
    Case("falcon_h1", {**_SSM, "head_dim": 8}, "state-space layers"),
    Case("bamba", {**_SSM, "attn_layer_indices": [1]}, "state-space layers"),
    Case(
        "jamba",
        {
            **_SSM,
            **_MOE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_dt_rank": 4,
        },
        "state-space layers",
    ),
    Case(
        "nemotron_h",
        {
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "use_mamba_kernels": False,
            "hybrid_override_pattern": "M*-",
            "num_hidden_layers": 3,
        },
        "state-space layers",
    ),
    Case(
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "head_dim": 8},
        "recurrent layers",
    ),
    Case("rwkv", {"attention_hidden_size": 32}, "recurrent layers"),
    Case("falcon", {}, "no exchangeable attention"),
    Case("bloom", {"n_layer": 2, "n_head": 4}, "no exchangeable attention"),
    Case("gptj", {**_N, "rotary_dim": 4}),
    Case(
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "no exchangeable attention",
    ),
    Case(
        "granitemoehybrid",
        {**_MOE, **_SSM, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
        "state-space layers",
    ),
    Case(
        "zamba2",
        {**_SSM, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
        "state-space layers",
    ),
    Case(
        "qwen3_5_text",
        {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], **_DELTA},
        "linear attention",
    ),
    Case(
        "gemma3",
        {"text_config": SHAPE | {"head_dim": 8}, "vision_config": _VISION, "mm_tokens_per_image": 4},
        "its text part; nothing else gets a gradient",
        common=False,
    ),
    Case(
        "gemma3n_text",
        {
            "head_dim": 8,
            **_SLIDING,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "altup_num_inputs": 2,
            "intermediate_size": [64, 64],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
        "sliding window",
    ),
    Case(
        "gemma4_text",
        {
            "head_dim": 8,
            **_SLIDING,
            "vocab_size_per_layer_input": VOCAB,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
        },
        "sliding window",
    ),
    Case("vaultgemma", {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, "soft caps"),
    Case(
        "llama4_text", {**_MOE, "head_dim": 8, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 64}, "experts"
    ),
    Case("mimo_v2_flash", {**_MOE}, "experts, sinks"),
    Case("hy_v3", {**_MOE, "head_dim": 8}, "experts"),
    Case(
        "deepseek_v32",
        {**_MOE, **_LATENT, "first_k_dense_replace": 1, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
        "experts, latent and sparse attention",
    ),
    Case(
        "minicpm3",
        {
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "scale_emb": 12,
            "dim_model_base": 8,
        },
        "divides hidden states before the head",
    ),
    Case("exaone", {}),
    Case("internlm3", {}),
    Case("bitnet", {}),
    Case("nanochat", {}),
    Case("diffllama", {}),
    Case("doge", {}),
    Case("jetmoe", {**_MOE, "kv_channels": 8}, "experts"),
    Case("biogpt", {}),
    Case("persimmon", {}),
    Case("codegen", {**_N, "rotary_dim": 4}),
    Case("ctrl", {**_N, "dff": 64}),
    Case("gpt_bigcode", {**_N}),
    Case("openai-gpt", {**_N}, "no exchangeable attention"),
    Case("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, "no exchangeable attention"),
    Case("xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}, "no exchangeable attention"),
    Case(
        "bart",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "encoder_ffn_dim": 64,
        },
        "an encoder and a decoder",
    ),
    Case("bert", {}, "an encoder"),
    Case(
        "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "an encoder and a decoder",
        causal=False,
    ),
    Case(
        "vit",
        {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
        "a vision model",
        common=False,
        causal=False,
    ),
)
