"""Inputs of the step benchmark: architectures with random weights or a model folder, and one batch for all engines."""

# B responses, L tokens of a sequence

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from or1.core.types import TrainSequence
from or1.magic.advantage import group_advantages

# Values of config.json on the hub. The tiny one has their proportions, except its vocabulary.
ARCHITECTURES = {
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}

# Every layer is the same, so a rehearsal needs only some of them.
ARCHITECTURES["qwen2.5-7b, four layers"] = ARCHITECTURES["qwen2.5-7b"] | {"num_hidden_layers": 4}

# Dense 16-bit peak in FLOP/s, by a substring of the device's name.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}

GROUP_SIZE = 4


def make_model(name: str, dtype: torch.dtype, device: torch.device, attention: str) -> PreTrainedModel:
    """Return a model of the architecture, with equal random weights at every call; or the model of a folder."""
    if name not in ARCHITECTURES:
        load: Any = AutoModelForCausalLM.from_pretrained
        return load(name, dtype=dtype, attn_implementation=attention, use_cache=False).train().to(device)
    config = Qwen2Config(
        **ARCHITECTURES[name],
        max_position_embeddings=1 << 20,
        rope_theta=1e6,
        use_cache=False,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            return Qwen2ForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def sizes_of(name: str) -> Mapping[str, Any]:
    """Return the sizes of an architecture, or of a model folder's config.

    Raises ValueError for a name that is neither.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if not Path(name).is_dir():
        raise ValueError(
            f"no model folder {name}, and no architecture of that name; there are {', '.join(ARCHITECTURES)}"
        )
    return AutoConfig.from_pretrained(name).to_dict()


def rollout(path: str | Path, section: str, responses: int) -> list[TrainSequence]:
    """Return sampled responses of a file that benchmarks.real.make writes: the first `responses` of a section.

    Raises ValueError if the file has no such section, or fewer responses.
    """
    sections = json.loads(Path(path).read_text(encoding="utf-8"))
    found = sections.get(section, [])
    if len(found) < responses:
        has = ", ".join(f"{name} with {len(documents)}" for name, documents in sections.items())
        raise ValueError(f"{path} has no {responses} responses of section {section!r}; the file has {has}")
    return [
        TrainSequence(
            np.array(d["prompt"], np.int32),
            np.array(d["response"], np.int32),
            np.zeros(len(d["response"]), np.float32),
            d["advantage"],
        )
        for d in found[:responses]
    ]


def ragged_batch(context: int, groups: int, prompt: int, vocab: int, seed: int = 0) -> list[TrainSequence]:
    """Return `groups` prompts with GROUP_SIZE responses each, with lengths as in long reasoning.

    The limit is `context` minus the prompt. Lengths are lognormal with a median of a quarter of the limit, clipped at
    the limit; one response has exactly the limit. Rewards are random, and every group has both right and wrong ones.
    """
    rng = np.random.default_rng(seed)
    limit = context - prompt
    lengths = np.clip(rng.lognormal(np.log(limit / 4), 0.8, (groups, GROUP_SIZE)), 1, limit).astype(int)
    lengths[0, 0] = limit
    rewards = np.stack([rng.permutation([1.0] + [0.0] * (GROUP_SIZE - 1)) for _ in range(groups)])
    advantages = group_advantages(rewards)
    made = []
    for g in range(groups):
        ids = rng.integers(0, vocab, prompt).astype(np.int32)
        for m in range(GROUP_SIZE):
            n = int(lengths[g, m])
            response = rng.integers(0, vocab, n).astype(np.int32)
            made.append(TrainSequence(ids, response, np.zeros(n, np.float32), float(advantages[g, m])))
    return made


def one_long_sequence(context: int, vocab: int) -> list[TrainSequence]:
    """Return a batch of one response as long as the context, to find the longest context that can be trained."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, context).astype(np.int32)
    return [TrainSequence(ids[:256], ids[256:], np.zeros(context - 256, np.float32), 1.0)]


def equal_documents(tokens: int, documents: int, vocab: int) -> list[TrainSequence]:
    """Return responses of equal length that fill one row of `tokens` tokens."""
    rng = np.random.default_rng(0)
    # The last token of a response is predicted and not read, so a response has one more than its row part.
    length = tokens // documents + 1
    made = []
    for i in range(documents):
        ids = rng.integers(0, vocab, length).astype(np.int32)
        prompt = min(256, length // 2)
        advantage = 1.0 if i % 2 == 0 else -1.0
        made.append(TrainSequence(ids[:prompt], ids[prompt:], np.zeros(length - prompt, np.float32), advantage))
    return made


def useful_flops(name: str, sequences: Sequence[TrainSequence]) -> float:
    """Return model FLOPs of forward and backward of the batch, without padding or recomputation.

    Counts six per weight and token (Kaplan et al. 2020, section 2.1), causal attention, and the head for trained
    tokens only.
    """
    a = sizes_of(name)
    head_dim = a["hidden_size"] // a["num_attention_heads"]
    attention = a["hidden_size"] * head_dim * (2 * a["num_attention_heads"] + 2 * a["num_key_value_heads"])
    layer = attention + 3 * a["hidden_size"] * a["intermediate_size"]
    lengths = np.array([s.packed_tokens for s in sequences], dtype=float)
    trained = sum(s.trained_tokens for s in sequences)
    scores = 6 * a["num_hidden_layers"] * a["hidden_size"] * (lengths**2).sum()
    return 6 * (a["num_hidden_layers"] * layer * lengths.sum() + a["vocab_size"] * a["hidden_size"] * trained) + scores


def padded(sequences: Sequence[TrainSequence], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the batch in the layout of TRL's trainer: prompts padded on the left, completions on the right."""
    prompt_width = max(len(s.prompt_ids) for s in sequences)
    width = max(len(s.response_ids) for s in sequences)
    out = {
        name: torch.zeros(len(sequences), columns, dtype=torch.int64)
        for name, columns in (
            ("prompt_ids", prompt_width),
            ("prompt_mask", prompt_width),
            ("completion_ids", width),
            ("completion_mask", width),
        )
    }
    for b, s in enumerate(sequences):
        p, n = len(s.prompt_ids), len(s.response_ids)
        out["prompt_ids"][b, prompt_width - p :] = torch.as_tensor(s.prompt_ids)
        out["prompt_mask"][b, prompt_width - p :] = 1
        out["completion_ids"][b, :n] = torch.as_tensor(s.response_ids)
        out["completion_mask"][b, :n] = 1
    out["advantages"] = torch.tensor([s.advantage for s in sequences], dtype=torch.float32)
    return {name: t.to(device) for name, t in out.items()}
