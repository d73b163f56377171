"""`[model]`: the policy and how its forward and backward run."""

from __future__ import annotations

from typing import Literal

from or1.config.base import Section


class ModelConfig(Section):
    """`[model]`"""

    path: str
    """Hugging Face checkpoint folder or hub id of a causal language model."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Type of the weights in forward and backward; the optimizer always keeps a master copy of at least fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
