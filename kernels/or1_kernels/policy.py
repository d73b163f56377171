"""The policy loss of a batch of rows and its gradients, made in one pass; no autograd in here.

Legend: N rows, C rows of a chunk, H hidden, V vocab.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunked
from .objective import PolicyObjective, TokenLoss, token_loss
from .rows import RowStats


@dataclass(frozen=True)
class PolicyRows:
    """The per-row constants of one policy loss, in the compute dtype, and what is done with them.

    grad_row_eps: rows whose gradient bound (see row_bound) is at most this leave the backward GEMMs; None: all stay.
    """

    objective: PolicyObjective
    entropy_coef: float | Tensor
    grad_row_eps: float | None = None
    advantages: Tensor = field(kw_only=True)
    token_weight: Tensor = field(kw_only=True)
    old_logp: Tensor | None = field(kw_only=True, default=None)
    rollout_logp: Tensor | None = field(kw_only=True, default=None)
    ref_logp: Tensor | None = field(kw_only=True, default=None)

    def terms(self, logp_C: Tensor, c: slice = slice(None)) -> TokenLoss:
        """The objective over rows c."""
        old, rollout, ref = (None if x is None else x[c] for x in (self.old_logp, self.rollout_logp, self.ref_logp))
        return token_loss(
            self.objective, logp_C, self.advantages[c], old_logp_N=old, rollout_logp_N=rollout, ref_logp_N=ref
        )

    def slopes(self, c: slice, stats: RowStats) -> chunked.Slopes:
        """dL/dlogp and dL/dentropy of rows c."""
        weight_C, slope_C = self.token_weight[c], self.terms(stats.logp_C, c).slope_N
        keep_C = None
        if self.grad_row_eps is not None:
            keep_C = ~self.negligible(weight_C, self.row_bound(slope_C, stats))
        return chunked.Slopes(weight_C * slope_C, -weight_C * self.entropy_coef, keep_C)

    def row_bound(self, slope_C: Tensor, stats: RowStats) -> Tensor:
        """Half the largest L1 norm that the gradient of a row's z can have, before token_weight.

        |dlogp/dz|_1 = 2 (1 - p_y), and |dH/dz|_1 = E|H + log p| <= 2 H because -log p is >= 0 with mean H.
        """
        return slope_C.abs() * -stats.logp_C.expm1() + abs(self.entropy_coef) * stats.entropy_C

    def negligible(self, weight_C: Tensor, bound_C: Tensor) -> Tensor:
        """bool[C]: rows that grad_row_eps drops. A nan bound keeps its row."""
        return (bound_C <= self.grad_row_eps) | (weight_C == 0) & ~bound_C.isnan()


class PolicyPass(NamedTuple):
    """Result of policy_pass: loss [], per-row values [N], and (hidden, weight, bias) gradients for dL = 1 or None.

    left_out: an upper bound on the L1 norm of dL/dlogits over the rows that grad_row_eps dropped; [] or None.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    left_out: Tensor | None
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]


def policy_pass(
    engine: chunked.Engine,
    inputs: chunked.RowInputs,
    rows: PolicyRows,
    needs: tuple[bool, bool, bool],
    main_grad_VH: Tensor | None = None,
) -> PolicyPass:
    """Loss, statistics and the wanted gradients; three GEMMs, or one when nothing is wanted."""
    if any(needs) or main_grad_VH is not None:
        engine.want_grads(needs, main_grad_VH)
        stats = chunked.score_and_grads(engine, inputs, rows.slopes)
    else:
        stats, _ = chunked.score(engine, inputs)
    terms = rows.terms(stats.logp_C)
    loss = (rows.token_weight * (terms.loss_N - rows.entropy_coef * stats.entropy_C)).sum()
    left_out = None
    if rows.grad_row_eps is not None:
        bound_N = rows.row_bound(terms.slope_N, stats)
        scale_N = 2 * engine.settings.transform.scale * inputs.inv_tau * rows.token_weight.abs()
        dropped_N = rows.negligible(rows.token_weight, bound_N)
        left_out = torch.where(dropped_N & (rows.token_weight != 0), scale_N * bound_N, 0.0).sum()
    grads = engine.grads()
    if main_grad_VH is not None:
        grads = (grads[0], None, grads[2])
    return PolicyPass(loss, stats.logp_C, stats.entropy_C, terms.ratio_N, terms.clipped_N, left_out, grads)
