"""Published shapes of models by hub id, for machines that cannot reach the hub, and for gated models.

Each entry has the fields of the model's config.json that determine tensor shapes.
"""

from __future__ import annotations

from typing import Any


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: tuple[int, int], *, vocab: int = 152_064, tied: bool = False
) -> dict[str, Any]:
    return _config("qwen2", hidden, intermediate, layers, heads, vocab=vocab, tied=tied)


def _qwen3(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], *, tied: bool) -> dict[str, Any]:
    config = _config("qwen3", hidden, intermediate, layers, heads, vocab=151_936, tied=tied)
    return config | {"head_dim": 128}


def _llama(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], *, tied: bool) -> dict[str, Any]:
    return _config("llama", hidden, intermediate, layers, heads, vocab=128_256, tied=tied)


def _config(
    family: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int], *, vocab: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "tie_word_embeddings": tied,
    }


_SMALL_VOCAB = 151_936
_QWEN2_0B5 = _qwen2(896, 4864, 24, (14, 2), vocab=_SMALL_VOCAB, tied=True)
_QWEN2_1B5 = _qwen2(1536, 8960, 28, (12, 2), vocab=_SMALL_VOCAB, tied=True)
_QWEN2_7B = _qwen2(3584, 18_944, 28, (28, 4))
_QWEN2_14B = _qwen2(5120, 13_824, 48, (40, 8))
_QWEN2_32B = _qwen2(5120, 27_648, 64, (40, 8))
_LLAMA_8B = _llama(4096, 14_336, 32, (32, 8), tied=False)

KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": _QWEN2_0B5,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_0B5,
    "Qwen/Qwen2.5-1.5B": _QWEN2_1B5,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN2_1B5,
    "Qwen/Qwen2.5-3B": _qwen2(2048, 11_008, 36, (16, 2), vocab=_SMALL_VOCAB, tied=True),
    "Qwen/Qwen2.5-7B": _QWEN2_7B,
    "Qwen/Qwen2.5-14B": _QWEN2_14B,
    "Qwen/Qwen2.5-32B": _QWEN2_32B,
    "Qwen/Qwen2.5-Math-1.5B": _QWEN2_1B5,
    "Qwen/Qwen2.5-Math-7B": _QWEN2_7B,
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, (16, 8), tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, (16, 8), tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, (32, 8), tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12_288, 36, (32, 8), tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17_408, 40, (40, 8), tied=False),
    "Qwen/Qwen3-30B-A3B": _qwen3(2048, 6144, 48, (32, 4), tied=False)
    | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "Qwen/Qwen3-32B": _qwen3(5120, 25_600, 64, (64, 8), tied=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2_1B5 | {"tie_word_embeddings": False},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN2_7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _QWEN2_14B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _QWEN2_32B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA_8B,
    "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, (32, 8), tied=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 8192, 28, (24, 8), tied=True),
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "Skywork/Skywork-OR1-7B": _QWEN2_7B,
    "Skywork/Skywork-OR1-Math-7B": _QWEN2_7B,
    "Skywork/Skywork-OR1-32B": _QWEN2_32B,
}
