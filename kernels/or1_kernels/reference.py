"""The definition of the fused head, written for reading. Every other implementation is tested on this one.

    z_nv = softcap * tanh(scale * (h_n . w_v + b_v) / softcap) / tau_n
           (without a softcap: scale * (h_n . w_v + b_v) / tau_n)
    logp_n = z_ny - log sum_v exp z_nv
    H_n = - sum_v p_nv log p_nv
    loss = sum_n token_weight_n * (objective_n(logp_n) - entropy_coef * H_n)

Differentiable by autograd, in any floating dtype, with a full [N, V] matrix.
Legend: N tokens, H hidden, V vocab.
"""

import torch
from torch import Tensor

from .objective import PolicyObjective, TokenLoss, token_loss


def logits(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return z [N, V] in the inputs' dtype. The temperature is applied last."""
    z_NV = hidden_NH @ weight_VH.T
    if bias_V is not None:
        z_NV = z_NV + bias_V
    z_NV = z_NV * logit_scale
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    return z_NV / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def logprob_entropy(z_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return (logp [N], entropy [N]) in nats. A token of probability 0 adds 0 to the entropy and to its gradient."""
    logp_NV = z_NV.log_softmax(-1)
    logp_N = logp_NV.gather(1, targets_N[:, None]).squeeze(1)
    finite_NV = logp_NV.masked_fill(logp_NV == -torch.inf, 0.0)
    return logp_N, -(logp_NV.exp() * finite_NV).sum(-1)


def policy_loss(
    logp_N: Tensor,
    entropy_N: Tensor,
    advantages_N: Tensor,
    *,
    token_weight_N: Tensor,
    objective: PolicyObjective,
    entropy_coef: float | Tensor = 0.0,
    old_logp_N: Tensor | None = None,
    rollout_logp_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    sequences_N: Tensor | None = None,
) -> tuple[Tensor, TokenLoss]:
    """Return (loss [], per-token terms). Autograd of the loss equals TokenLoss.slope_N, the closed form."""
    terms = token_loss(
        objective,
        logp_N,
        advantages_N,
        old_logp_N=old_logp_N,
        rollout_logp_N=rollout_logp_N,
        ref_logp_N=ref_logp_N,
        sequences_N=sequences_N,
    )
    return (token_weight_N * (terms.loss_N - entropy_coef * entropy_N)).sum(), terms
