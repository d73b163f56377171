"""Data types of the row passes, and the scalar step that joins pass 1 to pass 2.

Legend: C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..objective import PolicyObjective

# exp(-1e4) is 0 in fp32 and fp64. The floor keeps d finite, so that 0 * d is 0 and not nan where d would be -inf.
D_FLOOR = -1.0e4


class Transform(NamedTuple):
    """Map from raw logits to z: softcap * tanh(scale * raw / softcap), or scale * raw without a softcap."""

    scale: float = 1.0
    softcap: float | None = None


class RowSums(NamedTuple):
    """Result of pass 1 over one vocabulary shard, each [C].

    peak    max_v z_v
    target  z_y, or -inf where another shard holds y
    rest    sum_{v != y} exp d_v
    moment  sum_v d_v exp d_v
    """

    peak_C: Tensor
    target_C: Tensor
    rest_C: Tensor
    moment_C: Tensor


class RowStats(NamedTuple):
    """Statistics of each row over the whole vocabulary, each [C].

    logp, entropy   of the target and of the distribution, in nats
    peak, log_norm  give log p_v = (z_v - peak) / tau - log_norm
    """

    logp_C: Tensor
    entropy_C: Tensor
    peak_C: Tensor
    log_norm_C: Tensor


class TokenConstants(NamedTuple):
    """What the policy loss of a chunk needs besides logits, each [C].

    weight_C   token_weight
    bonus_C    dL/dentropy, -token_weight * entropy_coef
    one_sweep  bonus_C is 0 everywhere: entropy_coef is the number 0
    """

    objective: PolicyObjective
    one_sweep: bool
    advantages_C: Tensor
    weight_C: Tensor
    bonus_C: Tensor
    old_C: Tensor | None = None
    rollout_C: Tensor | None = None
    ref_C: Tensor | None = None

    def packed(self) -> Tensor:
        """Return [6, C]: advantages, weight, bonus, old, rollout, ref. Those that are None repeat the advantages."""
        first_C = self.advantages_C
        return torch.stack([first_C if x is None else x for x in self[2:]])


class PolicyDraw(NamedTuple):
    """Result of a policy pass over a chunk: objective.TokenLoss without its slope, and dL/draw.

    draw_CV    dL/draw, or dL/draw divided by factor_C
    factor_C   factor of each row of draw_CV; None: 1
    """

    logp_C: Tensor
    entropy_C: Tensor
    loss_C: Tensor
    ratio_C: Tensor
    clipped_C: Tensor
    draw_CV: Tensor
    factor_C: Tensor | None


def finish(sums: RowSums, inv_tau_C: Tensor) -> RowStats:
    """Return log-probs and entropies from sums over the whole vocabulary. Cost O(C)."""
    d_C = (sums.target_C - sums.peak_C) * inv_tau_C
    own_C = d_C.exp()
    norm_C = sums.rest_C + own_C
    # Near the maximum, log1p keeps the digits of 1 - p_y. Far below it own_C underflows, and the plain form is exact.
    near_C = d_C > -1
    logp_C = torch.where(near_C, -(sums.rest_C / own_C).log1p(), d_C - norm_C.log())
    log_norm_C = torch.where(near_C, d_C - logp_C, norm_C.log())
    return RowStats(logp_C, log_norm_C - sums.moment_C / norm_C, sums.peak_C, log_norm_C)
