"""`[model]`: the policy and how its forward and backward run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from or1.config.base import Section


def _from_bool(value: object) -> object:
    return {True: "layer", False: "none"}[value] if isinstance(value, bool) else value


class ModelConfig(Section):
    """`[model]`"""

    path: str
    """Hugging Face checkpoint folder or hub id of a causal language model."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Type of the weights in forward and backward; `optim.weights` says what the optimizer keeps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Attention over packed rows. flash: the flash-attn package; varlen: torch's own; both need a GPU and 16-bit
    weights. sdpa: exact on any device and type, slow on a GPU. auto: the first of these that can run."""
    gradient_checkpointing: Annotated[Literal["none", "layer", "offload"], BeforeValidator(_from_bool)] = "none"
    """layer: keep each layer's input and recompute the rest in backward. offload: keep those inputs in host memory (on
    the CPU the same as layer). true and false mean layer and none."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's Triton kernels for RMSNorm, RoPE and SwiGLU. auto: on a GPU, where installed and the architecture is
    known to Liger; never on the CPU."""
    mlp_tile_tokens: int = Field(16384, ge=0)
    """Rows longer than this pass through each MLP in tiles of at most this many tokens, which bounds its activations;
    free with gradient checkpointing, one more MLP forward without. 0: never."""
