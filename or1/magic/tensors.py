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
    """Return A_ij = (r_ij - mean_i) / (std_i + eps), with the sample standard deviation (report, Eq. 2.5).

    Computed on the CPU in fp64. A row of equal rewards becomes exactly 0, except with "reinforce_pp".

    Args:
        rewards_PM: float [P, M], M >= 2; nan where a response has no reward.
        eps: added to the standard deviation.
        kind: "group", as above. "rloo": minus the mean of the other responses (arXiv:2402.14740). "reinforce_pp" and
            "reinforce_pp_baseline": one standard deviation for all prompts (arXiv:2501.03262).

    Returns:
        Advantages [P, M], of the dtype and on the device of rewards_PM.
    """
    return torch.from_numpy(advantages(_array(rewards_PM), kind, eps=eps)).to(rewards_PM)


def has_advantage(rewards_PM: Tensor) -> Tensor:
    """Return whether the rewards of a group differ, so that its advantages are not all 0 (report, section 3.1).

    Args:
        rewards_PM: float [P, M].

    Returns:
        bool[P], on the device of rewards_PM.
    """
    return torch.from_numpy(advantage.have_advantages(_array(rewards_PM))).to(rewards_PM.device)


def reject_zero_advantage(mask_BT: Tensor, rewards_PM: Tensor) -> Tensor:
    """Return the loss mask without the tokens of groups of equal rewards (report, section 3.1).

    Such tokens have no policy gradient. In the mask they would count in the denominator of Eq. 3.1, and the entropy
    term would act on prompts that are solved or hopeless.

    Args:
        mask_BT: [B, T] of any dtype, B = P M, group after group.
        rewards_PM: float [P, M].

    Returns:
        A new mask [B, T] of the same dtype.

    Raises:
        ValueError: B is not P M.
    """
    if len(mask_BT) != rewards_PM.numel():
        raise ValueError(
            f"mask has {len(mask_BT)} rows and rewards are {list(rewards_PM.shape)}; it must have a row a "
            "reward, group after group"
        )
    keep_B = has_advantage(rewards_PM).repeat_interleave(rewards_PM.shape[1]).to(mask_BT.device)
    return mask_BT * keep_B[:, None].to(mask_BT.dtype)


def token_denominator(mask_BT: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return T_k of the report's Eq. 3.1: trained tokens of the whole update.

        loss = 1/T_k sum_i sum_j sum_t (policy loss of token t - alpha_k entropy of token t)

    Gradients must be summed over ranks: if a wrapper (DDP, FSDP) averages them, multiply the loss by the number of
    ranks.

    Args:
        mask_BT: [B, T] of all micro-batches of the update, or any tensor that sums to their number of tokens.
        group: ranks to sum over, if torch.distributed runs; None: all.

    Returns:
        f64[], at least 1.
    """
    tokens = mask_BT.sum(dtype=torch.float64)
    return _sum_ranks(tokens, group).clamp(min=1)


def rollout_entropy(logp_BT: Tensor, mask_BT: Tensor, group: ProcessGroup | None = None) -> float:
    """Return e_k of the report's Eq. 3.2: the mean of -log p over sampled tokens.

    The mean is unbiased for the policy that sampled, and known before the update.

    Args:
        logp_BT: [B, T], nats, at the sampling temperature. Values outside the mask are not read.
        mask_BT: [B, T], True or 1 for the tokens that count.
        group: ranks to average over, if torch.distributed runs; None: all.

    Returns:
        Nats a token; 0 without a token.
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
