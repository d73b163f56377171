"""Runs with adapters, and the same update by PEFT and plain autograd."""

# L tokens of a sequence, V vocab

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from or1.config import DistConfig, ModelConfig, OptimConfig
from or1.core.types import TrainSequence
from or1.dist.world import SINGLE, World, join
from or1.model.load import load_model
from or1.model.shared_prompts import Sharing
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.update import update
from tests.helpers.dist_work import ALPHA, Probe, policy_of, sequences_of, whole

LORA = {"rank": 4, "alpha": 8.0}
TEMPERATURE = 1.1


def load(path: Path, dtype: str = "float32", world: World = SINGLE, **settings: Any) -> PreTrainedModel:
    """Return a model with adapters, both of whose factors are random, so that each gets a gradient."""
    given = {"lora": LORA} | settings
    model = load_model(ModelConfig(path=str(path), dtype=dtype, device="cpu", **given), world).train()
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module, scale: float = 0.1) -> None:
    """Set the second factors to random numbers, the same on any number of ranks."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" not in name:
            continue
        values = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if hasattr(parameter, "device_mesh"):
            local, mesh = parameter.to_local(), parameter.device_mesh
            values = values.chunk(mesh.size())[mesh.get_local_rank()] if len(local) else values[:0]
            local.copy_(values)
        else:
            parameter.copy_(values)


def plain_loss(model: nn.Module, sequences: list[TrainSequence]) -> Tensor:
    """Eq. 3.1 on-policy as written: one sequence at a time, full logits, plain autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for s in sequences:
        ids = torch.as_tensor(np.concatenate([s.prompt_ids, s.response_ids]).astype(np.int64))
        logits_LV = model(input_ids=ids[None, :-1], use_cache=False).logits[0, len(s.prompt_ids) - 1 :]
        table_LV = (logits_LV.double() / TEMPERATURE).log_softmax(-1)
        logp_L = table_LV.gather(1, ids[len(s.prompt_ids) :, None])[:, 0]
        entropy_L = -(table_LV.exp() * table_LV).sum(-1)
        ratio_L = (logp_L - logp_L.detach()).exp()
        total = total - (ratio_L * s.advantage + ALPHA * entropy_L).sum()
    return total / sum(len(s.response_ids) for s in sequences)


def peft_model(path: Path, like: PreTrainedModel, dtype: torch.dtype) -> Any:
    """Return PEFT's own model of the checkpoint, with the adapters of `like`."""
    import peft

    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    settings = peft.LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear", lora_dropout=0.0)
    model = peft.get_peft_model(base, settings).train()
    ours = {f"base_model.model.{name}": p for name, p in like.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() and ours
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    return model


def logp_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the log-probs of the next tokens, float[B, L - 1]."""
    with torch.no_grad():
        table = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return table.gather(-1, ids[:, 1:, None])[..., 0]


def gradients(path: Path, dtype: str, sharing: Sharing = "off", max_tokens: int = 96, **settings: Any) -> dict:
    """Return what an update of 13 sequences gives to the optimizer."""
    model = load(path, dtype, **settings)
    optimizer = Probe(model, OptimConfig(grad_clip=1e30))
    policy = policy_of(model, SINGLE, sharing)
    policy.budget.max_tokens = max_tokens
    assert update(policy, optimizer, sequences_of(13), ALPHA, UpdateStats())
    return optimizer.seen


def update_on_ranks(path: Path, dtype: str, sequence_parallel: int) -> dict[str, Any]:
    """Return gradients, loss, new adapters and dtypes of an update in a world of ranks."""
    with join(DistConfig(sequence_parallel=sequence_parallel, timeout_s=60), torch.device("cpu")) as world:
        model = load(path, dtype, world)
        optimizer = Probe(model, OptimConfig(grad_clip=1e30, lr=1e-3), world)
        stats = UpdateStats()
        assert update(policy_of(model, world), optimizer, sequences_of(13), ALPHA, stats)
        stats.reduce(world)
        from or1.model.export import named_weights

        return {
            "grads": optimizer.seen,
            "loss": stats.metrics()["optim/loss"],
            "adapters": {n: whole(p) for n, p in model.named_parameters() if p.requires_grad},
            "merged": {n: whole(t) for n, t in named_weights(model)},
            "base dtypes": {str(p.dtype) for p in model.parameters() if not p.requires_grad},
            "state": sorted(optimizer.state_tensors()),
        }


def twenty_losses(path: Path) -> tuple[list[float], list[float]]:
    """Return the losses of 20 steps of or1, and of PEFT with torch's AdamW, from the same adapters, in fp64.

    In fp32 AdamW amplifies rounding where a gradient is near 0, and the losses part after ten steps.
    """
    model = load(path, "float64")
    plain = peft_model(path, model, torch.float64)
    config = OptimConfig(lr=1e-2, grad_clip=0.5, weight_decay=0.01)
    optimizer = MasterAdamW(model, config)
    trained = [p for p in plain.parameters() if p.requires_grad]
    own = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.01)
    ours, theirs = [], []
    for step in range(20):
        sequences, stats = sequences_of(3, seed=step), UpdateStats()
        update(policy_of(model, SINGLE), optimizer, sequences, ALPHA, stats)
        ours.append(stats.losses[0])
        loss = plain_loss(plain, sequences)
        own.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        own.step()
        theirs.append(loss.item())
    return ours, theirs
