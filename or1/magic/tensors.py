"""MAGIC for a trainer of your own: the report's parts as functions of tensors and floats (Skywork-OR1, section 3).

    keep_P = has_advantage(rewards_PM)                          rejection, section 3.1
    adv_PM = group_advantages(rewards_PM)                       Eq. 2.5
    denom  = token_denominator(mask_BT * keep_B[:, None])       T_k of Eq. 3.1
    e_k    = rollout_entropy(logp_BT, mask_BT)                  e_k of Eq. 3.2
    alpha  = controller.alpha(e_k)                              alpha_k of Eq. 3.2, EntropyController
    loss   = (mask * (policy_loss - alpha * entropy)).sum() / denom

Legend: P prompts, M responses each, B = P M responses, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from or1.magic.entropy import EntropyController

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "EntropyController",
    "group_advantages",
    "has_advantage",
    "reject_zero_advantage",
    "rollout_entropy",
    "token_denominator",
]


def group_advantages(rewards_PM: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 2.5: A_ij = (r_ij - mean_i) / (std_i + eps), the sample standard deviation (ddof 1); float [P, M], M >= 2.

    A row of equal rewards becomes exactly 0.
    """
    centred_PM = rewards_PM - rewards_PM.mean(1, keepdim=True)
    # The mean of equal numbers may differ from them in the last bit, and the division would blow that up.
    return torch.where(has_advantage(rewards_PM)[:, None], centred_PM / (rewards_PM.std(1, keepdim=True) + eps), 0.0)


def has_advantage(rewards_PM: Tensor) -> Tensor:
    """Section 3.1: bool[P], whether min_j r_ij < max_j r_ij, so that the advantages of group i are not all 0."""
    return rewards_PM.amin(1) < rewards_PM.amax(1)


def reject_zero_advantage(mask_BT: Tensor, rewards_PM: Tensor) -> Tensor:
    """Section 3.1: the loss mask [B, T] with every token of a group of equal rewards taken out; B = P M, in order.

    Such tokens have no policy gradient, but would count in the denominator of Eq. 3.1 and let the entropy term act on
    prompts that are solved or hopeless. Raises ValueError if B is not P M.
    """
    if len(mask_BT) != rewards_PM.numel():
        raise ValueError(
            f"mask has {len(mask_BT)} rows and rewards are {list(rewards_PM.shape)}; it must have a row a "
            "reward, group after group"
        )
    keep_B = has_advantage(rewards_PM).repeat_interleave(rewards_PM.shape[1]).to(mask_BT.device)
    return mask_BT * keep_B[:, None].to(mask_BT.dtype)


def token_denominator(mask_BT: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """T_k of Eq. 3.1: trained tokens of the whole update, f64[], at least 1.

        loss = 1/T_k sum_i sum_j sum_t (policy loss of token t - alpha_k entropy of token t)

    mask [B, T] is of all micro-batches of the update, or their number of tokens in any shape that sums to it. Where
    torch.distributed runs, all ranks of `group` are summed: gradients must then be summed over ranks too, and where a
    wrapper averages them (DDP, FSDP), multiply the loss by the number of ranks.
    """
    tokens = mask_BT.sum(dtype=torch.float64)
    return _sum_ranks(tokens, group).clamp(min=1)


def rollout_entropy(logp_BT: Tensor, mask_BT: Tensor, group: ProcessGroup | None = None) -> float:
    """e_k of Eq. 3.2: the mean of -log p over sampled tokens, nats; all ranks where torch.distributed runs.

    logp [B, T] at the sampling temperature. Unbiased for the policy that sampled, and known before the update.
    """
    picked = torch.where(mask_BT.bool(), logp_BT.double(), 0.0)
    total, tokens = _sum_ranks(torch.stack([-picked.sum(), mask_BT.sum(dtype=torch.float64)]), group).tolist()
    return total / max(tokens, 1.0)


def _sum_ranks(value: Tensor, group: ProcessGroup | None) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, group=group)
    return value
