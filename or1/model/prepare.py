"""Preparation of a loaded model for training: LMHead, Liger, tiles, checkpointing, device or shards."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from or1.config import ModelConfig
from or1.core.errors import ModelError
from or1.dist.fsdp import shard_model
from or1.dist.ulysses import check_heads
from or1.dist.world import SINGLE, World
from or1.model.compiled import compile_elementwise
from or1.model.lora.layers import add_adapters
from or1.model.memory import apply_liger, checkpoint_layers, checkpointing_mode, tile_mlps
from or1_kernels.lm_head import LMHead


def put_head(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Replace the output embedding by an LMHead over the same parameter; return the model. Raises ModelError."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{path!r}: the output embedding is {type(head).__name__}, not Linear; unsupported")
    if model.get_decoder() is model:
        raise ModelError(
            f"{path!r}: transformers has no decoder without the head for {model.config.model_type}; unsupported"
        )
    settings = model.config.get_text_config()
    # Cohere multiplies the logits by logit_scale; Granite divides them by logits_scaling.
    scale = getattr(settings, "logit_scale", None) or 1.0 / (getattr(settings, "logits_scaling", None) or 1.0)
    softcap = getattr(settings, "final_logit_softcapping", None)
    model.set_output_embeddings(LMHead.from_linear(head, softcap=softcap, logit_scale=scale))
    return model


def prepare_model(
    model: PreTrainedModel, config: ModelConfig, device: torch.device, world: World = SINGLE
) -> PreTrainedModel:
    """Apply the options of `[model]` to a model with weights, and move the model to its device or shard it."""
    put_head(model, config.path)
    check_heads(model.config, world.sequence_size)
    # Both replace the same parts.
    apply_liger(model, "off" if config.compile else config.liger, device)
    if config.compile:
        compile_elementwise(model, device)
    # After Liger, since Liger replaces the forward of the MLPs.
    if config.tile_tokens:
        tile_mlps(model, config.tile_tokens)
    mode = checkpointing_mode(config.gradient_checkpointing, device)
    # "auto" leaves a model alone that transformers cannot checkpoint; an explicit wish is refused with a reason.
    if mode != "none" and (config.gradient_checkpointing != "auto" or model.supports_gradient_checkpointing):
        checkpoint_layers(model, mode)
    # After tiles, which look for linear layers, and before shards, which are made of the adapters too.
    if config.lora is not None:
        add_adapters(model, config.lora, config.path)
    return shard_model(model, world, device)
