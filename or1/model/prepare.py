"""A model made ready for training: its head, Liger, tiles, checkpointing, device or shards."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from or1.config import ModelConfig
from or1.core.errors import ModelError
from or1.dist.fsdp import shard_model
from or1.dist.ulysses import check_heads
from or1.dist.world import SINGLE, World
from or1.model.memory import apply_liger, checkpoint_layers, tile_mlps
from or1_kernels.lm_head import LMHead


def put_head(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Replace the output embedding by an LMHead over the same parameter; returns the model."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{path!r}: the output embedding is {type(head).__name__}, not Linear; unsupported")
    if model.get_decoder() is model:
        raise ModelError(
            f"{path!r}: transformers gives no decoder of {model.config.model_type} apart from its head; unsupported"
        )
    settings = model.config.get_text_config()
    # Cohere multiplies its logits, Granite divides them.
    scale = getattr(settings, "logit_scale", None) or 1.0 / (getattr(settings, "logits_scaling", None) or 1.0)
    softcap = getattr(settings, "final_logit_softcapping", None)
    model.set_output_embeddings(LMHead.from_linear(head, softcap=softcap, logit_scale=scale))
    return model


def prepare_model(
    model: PreTrainedModel, config: ModelConfig, device: torch.device, world: World = SINGLE
) -> PreTrainedModel:
    """What `load_model` does once there are weights: LMHead, Liger, tiles, checkpointing, the device or the shards."""
    put_head(model, config.path)
    check_heads(model.config, world.sequence_size)
    apply_liger(model, config.liger, device)
    # After Liger, which replaces the forward of the MLPs.
    if config.mlp_tile_tokens:
        tile_mlps(model, config.mlp_tile_tokens)
    if config.gradient_checkpointing != "none":
        checkpoint_layers(model, offload=config.gradient_checkpointing == "offload")
    return shard_model(model, world, device)
