"""Fused LM-head losses for RL: token log-probs, entropy and the clipped loss, without a [tokens, vocab] tensor.

kernels/README.md explains the design and shows how to extend it.
"""

from .head import PolicyStats, linear_logprob_entropy, linear_policy_loss
from .lm_head import LMHead
from .objective import PolicyObjective, TokenLoss, token_loss
from .options import HeadOptions, HeadOptionsDict

__version__ = "0.1.0"
"""The version of or1 whose kernels these are."""

__all__ = [
    "HeadOptions",
    "HeadOptionsDict",
    "LMHead",
    "PolicyObjective",
    "PolicyStats",
    "TokenLoss",
    "linear_logprob_entropy",
    "linear_policy_loss",
    "token_loss",
]
