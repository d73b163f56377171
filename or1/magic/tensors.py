"""MAGIC for other trainers: the report's parts as functions of tensors and floats (Skywork-OR1, section 3).

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

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from or1.magic import advantage
from or1.magic.baselines import AdvantageKind, advantages
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


def group_advantages(rewards_PM: Tensor, eps: float = 1e-6, kind: AdvantageKind = "group") -> Tensor:
    """Return Eq. 2.5: A_ij = (r_ij - mean_i) / (std_i + eps), with the sample standard deviation; float [P, M], M >= 2.

    A row of equal rewards becomes exactly 0. Computed on the CPU in fp64. kind: another baseline, see
    or1.magic.baselines.advantages.
    """
    return torch.from_numpy(advantages(_array(rewards_PM), kind, eps=eps)).to(rewards_PM)


def has_advantage(rewards_PM: Tensor) -> Tensor:
    """Return bool[P] (section 3.1): min_j r_ij < max_j r_ij, so that the advantages of group i are not all 0."""
    return torch.from_numpy(advantage.have_advantages(_array(rewards_PM))).to(rewards_PM.device)


def reject_zero_advantage(mask_BT: Tensor, rewards_PM: Tensor) -> Tensor:
    """Return the loss mask [B, T] without the tokens of groups of equal rewards (section 3.1); B = P M, in order.

    Such tokens have no policy gradient. In the mask they would count in the denominator of Eq. 3.1, and the entropy
    term would act on prompts that are solved or hopeless. Raises ValueError if B is not P M.
    """
    if len(mask_BT) != rewards_PM.numel():
        raise ValueError(
            f"mask has {len(mask_BT)} rows and rewards are {list(rewards_PM.shape)}; it must have a row a "
            "reward, group after group"
        )
    keep_B = has_advantage(rewards_PM).repeat_interleave(rewards_PM.shape[1]).to(mask_BT.device)
    return mask_BT * keep_B[:, None].to(mask_BT.dtype)


def token_denominator(mask_BT: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return T_k of Eq. 3.1: trained tokens of the whole update, f64[], at least 1.

        loss = 1/T_k sum_i sum_j sum_t (policy loss of token t - alpha_k entropy of token t)

    mask [B, T] is of all micro-batches of the update, or any tensor that sums to their number of tokens. If
    torch.distributed runs, the ranks of `group` are summed. Gradients must be summed over ranks too: if a wrapper (DDP,
    FSDP) averages them, multiply the loss by the number of ranks.
    """
    tokens = mask_BT.sum(dtype=torch.float64)
    return _sum_ranks(tokens, group).clamp(min=1)


def rollout_entropy(logp_BT: Tensor, mask_BT: Tensor, group: ProcessGroup | None = None) -> float:
    """Return e_k of Eq. 3.2: the mean of -log p over sampled tokens, in nats, over all ranks of torch.distributed.

    logp [B, T] at the sampling temperature. The mean is unbiased for the policy that sampled, and known before the
    update.
    """
    picked = torch.where(mask_BT.bool(), logp_BT.double(), 0.0)
    total, tokens = _sum_ranks(torch.stack([-picked.sum(), mask_BT.sum(dtype=torch.float64)]), group).tolist()
    return float(total / max(tokens, 1.0))


def _sum_ranks(value: Tensor, group: ProcessGroup | None) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, group=group)
    return value


def _array(rewards_PM: Tensor) -> np.ndarray:
    return rewards_PM.detach().to("cpu", torch.float64).numpy()
