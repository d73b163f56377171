"""`[optim]`: the optimizer and the size of a packed row."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from or1.config.model import short_dtype
from or1.config.section import MOST_STEPS, Section


class OptimConfig(Section):
    """`[optim]`"""

    optimizer: Literal["adamw", "adamw8bit", "offload"] = "adamw"
    """adamw: fp32 moments on the device. adamw8bit: blockwise 8-bit moments (torchao). offload: fp32 moments and
    master weights in host memory, with the update on the CPU."""
    weights: Literal["master", "stochastic"] = "master"
    """Weights that the update is added to. master: an fp32 copy of bf16 weights. stochastic: the bf16 weights, with
    stochastic rounding, so that small updates survive on average; saves 4 bytes per parameter."""
    grad_dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(short_dtype)] = "float32"
    """Type in which gradients of a bf16 model are summed over packed rows; bfloat16 saves 2 bytes per parameter.
    Gradients of other models are summed in the model's type."""
    lr: float = Field(1e-6, gt=0, le=10)
    """Learning rate of AdamW, constant after the warm-up."""
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
    """Number of updates over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays, each in [0, 1)."""
    eps: float = Field(1e-8, ge=1e-30, le=1)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.01, ge=0, le=100)
    """Decoupled weight decay of matrices; none for norms and biases."""
    grad_clip: float = Field(1.0, ge=1e-30, le=1e30)
    """Largest gradient norm of one update."""
    max_tokens_per_rank: int = Field(32768, ge=1, le=2**31 - 1)
    """Largest number of tokens in a packed row; affects peak memory, not the gradient."""
    share_prompts: Literal["auto", "on", "off"] = "auto"
    """Responses of a group share one copy of their prompt in a packed row; the gradient is the same. auto: if that
    saves at least 10 % of the tokens."""
    max_nonfinite_steps: int = Field(3, ge=1, le=MOST_STEPS)
    """Stop after this many consecutive updates were skipped because of a non-finite loss or gradient."""
