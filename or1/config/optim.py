"""`[optim]`: the optimizer and the size of a packed row."""

from __future__ import annotations

from pydantic import Field

from or1.config.base import Section


class OptimConfig(Section):
    """`[optim]`"""

    lr: float = Field(1e-6, gt=0)
    """Learning rate of AdamW, constant after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays, each in [0, 1)."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay on matrices; norms and biases have none."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest gradient norm of one update."""
    max_tokens_per_rank: int = Field(32768, ge=1)
    """Tokens in one packed row; sets peak memory, never the gradient."""
    max_nonfinite_steps: int = Field(3, ge=1)
    """Stop after this many updates in a row were skipped for a non-finite loss or gradient."""
