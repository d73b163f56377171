"""Which architectures train: random checkpoints of two to four layers, asked and trained for one step.

    python -m benchmarks.architectures > docs/models.md

Every checkpoint is made from the configuration class of transformers, with dropout and what else the architecture is
known for, is written as a folder, and goes through what `or1 train` does with a folder. A slow test holds the page and
this program equal.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from or1.budget import Budget
from or1.config import ModelConfig
from or1.config.optim import OptimConfig
from or1.isolation import PackingError, rehearse_model
from or1.launch import quiet_libraries
from or1.model import load_model
from or1.optim import MasterAdamW
from or1.pack import TrainSequence
from or1.step_metrics import UpdateStats
from or1.update import UpdateSettings, update_policy, with_old_logp
from or1_kernels.objective import PolicyObjective

VOCAB = 96
_SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SSM = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_d_ssm": 64}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An architecture: its `model_type`, settings beside the common ones, and what stands out about it.

    common  whether the common settings hold, whose names most architectures share
    causal  whether it has a causal language model; else its base model is written
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
    Case("gemma2", {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                    "query_pre_attn_scalar": 8}, "soft caps, sliding window"),
    Case("gemma3_text", {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
         "sliding window"),
    Case("phi", {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    Case("phi3", {"resid_pdrop": 0.1}),
    Case("gpt_neox", {"hidden_dropout": 0.1}),
    Case("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    Case("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1, "layerdrop": 0.1}),
    Case("olmo", {}),
    Case("olmo2", {}),
    Case("olmo3", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, "sliding window"),
    Case("smollm3", {"no_rope_layers": [1, 0]}),
    Case("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.2, "attention_multiplier": 0.02}),
    Case("cohere", {"logit_scale": 0.25}),
    Case("cohere2", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, "sliding window"),
    Case("glm", {"head_dim": 8}),
    Case("glm4", {"head_dim": 8}),
    Case("stablelm", {}),
    Case("starcoder2", {"residual_dropout": 0.1, "embedding_dropout": 0.1, "sliding_window": 4}, "sliding window"),
    Case("nemotron", {}),
    Case("exaone4", {"sliding_window": 4, "sliding_window_pattern": 2, "layer_types": ["sliding_attention",
                                                                                    "full_attention"]}),
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
    Case("deepseek_v2", {**_MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
                         "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
                         "num_key_value_heads": 4}, "experts, latent attention"),
    Case("deepseek_v3", {**_MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
                         "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
                         "num_key_value_heads": 4, "first_k_dense_replace": 1}, "experts, latent attention"),
    Case("gpt_oss", {**_MOE, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention",
                                                                              "full_attention"]},
         "experts, sinks, sliding window"),
    Case("minimax", {**_MOE, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    Case("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}),
    Case("qwen3_next", {**_MOE, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                        "linear_value_head_dim": 8, "shared_expert_intermediate_size": 32}),
    Case("mamba", {"state_size": 8, "num_hidden_layers": 2, "vocab_size": VOCAB, "hidden_size": 32}, common=False),
    Case("mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8,
                    "num_hidden_layers": 2, "vocab_size": VOCAB, "hidden_size": 32}, common=False),
    Case("falcon_h1", {**_SSM, "head_dim": 8}),
    Case("bamba", {**_SSM, "attn_layer_indices": [1]}),
    Case("jamba", {**_SSM, **_MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                   "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4}),
    Case("nemotron_h", {"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
                        "chunk_size": 8, "use_mamba_kernels": False, "hybrid_override_pattern": "M*-",
                        "num_hidden_layers": 3}),
    Case("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "head_dim": 8}),
    Case("rwkv", {"attention_hidden_size": 32}),
    Case("falcon", {}),
    Case("bloom", {"n_layer": 2, "n_head": 4}),
    Case("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    Case("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    Case("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    Case("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    Case("ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "dff": 64}),
    Case("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    Case("granitemoehybrid", {**_MOE, **_SSM, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}),
    Case("qwen3_5_text", {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                        "linear_value_head_dim": 8}),
    Case("llama4_text", {**_MOE, "head_dim": 8, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 64}),
    Case("gemma3n_text", {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
                          "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
                          "num_kv_shared_layers": 0, "altup_num_inputs": 2, "intermediate_size": [64, 64],
                          "activation_sparsity_pattern": [0.0, 0.0]}),
    Case("gemma4_text", {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
                         "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "global_head_dim": 8}),
    Case("gemma3", {"text_config": _SHAPE | {"head_dim": 8}, "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}, common=False),
    Case("diffllama", {}),
    Case("doge", {}),
    Case("jetmoe", {**_MOE, "kv_channels": 8}),
    Case("dbrx", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, common=False),
    Case("zamba2", {**_SSM, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]}),
    Case("mimo_v2_flash", {**_MOE}),
    Case("deepseek_v32", {**_MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
                         "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
                         "num_key_value_heads": 4, "first_k_dense_replace": 1, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}, "experts, latent attention"),
    Case("minicpm3", {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4, "scale_emb": 12, "dim_model_base": 8}),
    Case("nanochat", {}),
    Case("xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}),
    Case("biogpt", {}),
    Case("persimmon", {}),
    Case("exaone", {}),
    Case("internlm3", {}),
    Case("bitnet", {}),
    Case("vaultgemma", {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    Case("hy_v3", {**_MOE, "head_dim": 8}),
    Case("bart", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64}),
    Case("whisper", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64}),
    Case("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    Case("bert", {}, "an encoder"),
    Case("t5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, "an encoder and a decoder",
         causal=False),
    Case("vit", {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
         "a vision model", common=False, causal=False),
)  # fmt: skip


def write_checkpoint(case: Case, folder: Path) -> None:
    """Write a random checkpoint of an architecture."""
    config = CONFIG_MAPPING[case.name](**(_SHAPE if case.common else {}) | case.settings)
    torch.manual_seed(0)
    (AutoModelForCausalLM if case.causal else AutoModel).from_config(config).save_pretrained(folder)


def verdict(case: Case, folder: Path) -> str:
    """`trains`, or the reason why not, as `or1 train --dry-run` and loading give it alike."""
    write_checkpoint(case, folder)
    settings = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    found = [_reason(folder, settings, rehearse_model), _reason(folder, settings, _one_step)]
    if found[0] != found[1]:
        raise AssertionError(f"{case.name}: the dry run says {found[0]!r}, training {found[1]!r}")
    return found[0]


def _reason(folder: Path, settings: ModelConfig, action: Any) -> str:
    try:
        action(settings)
    except PackingError as error:
        return error.reason
    except ValueError as error:
        if not type(error).__module__.startswith("or1"):
            raise
        text = str(error).replace(repr(str(folder)), "").split("cannot be trained: ")[-1].split("cannot be read: ")[-1]
        return " ".join(text.split("; ")[0].split())
    return "trains"


def _one_step(settings: ModelConfig) -> None:
    model = load_model(settings).train()
    random = np.random.default_rng(0)
    prompt = random.integers(3, VOCAB, 5, dtype=np.int32)
    sequences = [TrainSequence(prompt, random.integers(3, VOCAB, n, dtype=np.int32), np.zeros(n, np.float32), a)
                 for n, a in ((6, 1.0), (9, -1.0), (4, 0.5))]  # fmt: skip
    budget = UpdateSettings(PolicyObjective(), 0.0, 1.0, Budget(64), "on")
    sequences = [TrainSequence(s.prompt_ids, s.response_ids, s.old_logp, s.advantage)
                 for s in with_old_logp(model, sequences, budget)]  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stats = UpdateStats()
    if not update_policy(model, MasterAdamW(model, OptimConfig(lr=1e-2, max_tokens_per_rank=64)), sequences, budget,
                         stats):  # fmt: skip
        raise AssertionError("the step was not taken")
    numbers = stats.metrics()
    if abs(numbers["mismatch/ratio_max"] - 1) > 1e-4:
        raise AssertionError(f"on-policy ratios are not 1: {numbers['mismatch/ratio_max']}")
    moved = sum(not p.equal(before[name]) for name, p in model.named_parameters())
    if moved < 0.7 * len(before):
        raise AssertionError(f"only {moved} of {len(before)} tensors moved")


def verdicts() -> Iterator[tuple[Case, str]]:
    """All cases with what becomes of them."""
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            yield case, verdict(case, Path(folder) / case.name)


if __name__ == "__main__":
    quiet_libraries()
    import time
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if len(sys.argv) > 1 and case.name not in sys.argv[1:]: continue
            t = time.time()
            try:
                print(case.name, "|", verdict(case, Path(folder) / case.name), f"{time.time() - t:.1f}", flush=True)
            except Exception as error:
                import traceback
                tb = traceback.extract_tb(error.__traceback__)[-1]
                print(case.name, "!!!", type(error).__name__, str(error)[:300], tb.filename[-60:], tb.lineno, flush=True)
