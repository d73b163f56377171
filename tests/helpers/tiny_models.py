"""Tiny models of several architectures, their batches, and the loss from their own logits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models import cohere, gemma2, granite, llama, qwen2, qwen3_moe

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}
CONFIGS = {
    "qwen2": qwen2.Qwen2Config(**SMALL),
    "llama, tied": llama.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma2, softcap": gemma2.Gemma2Config(**SMALL, final_logit_softcapping=3.0, query_pre_attn_scalar=16),
    "cohere, logit_scale": cohere.CohereConfig(**SMALL, logit_scale=0.25),
    "granite, logits_scaling": granite.GraniteConfig(**SMALL, logits_scaling=3.0),
    "qwen3 moe, router loss": qwen3_moe.Qwen3MoeConfig(
        **SMALL,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    ),
}


def tiny(name: str = "qwen2") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 101, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 5:8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def from_logits(model: nn.Module, inputs: dict[str, Tensor], temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probs, entropy, loss), computed from full logits."""
    out = model(**inputs)
    labels = inputs["labels"][:, 1:]
    table = (out.logits[:, :-1].float() / temperature).log_softmax(-1)
    scored = labels != -100
    logp = table.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * scored
    return logp, -(table.exp() * table).sum(-1) * scored, out.loss


def grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(got: dict[str, Tensor], want: dict[str, Tensor], rel: float = 1e-4) -> None:
    assert got.keys() == want.keys() and want
    scale = max(float(g.norm()) for g in want.values())
    for name, grad in want.items():
        assert float((got[name] - grad).norm()) <= rel * float(grad.norm()) + 1e-7 * scale, name
