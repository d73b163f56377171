"""The policy loss of a batch of rows and its gradients, computed in one pass and without autograd.

Legend: N rows, C rows of a chunk, H hidden, V vocab.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..objective import PolicyObjective, TokenLoss, token_loss
from ..rows import RowStats, TokenConstants
from . import chunked, wide


@dataclass(frozen=True, kw_only=True)
class PolicyRows:
    """Constants of one policy loss; tensors are [N] in the compute dtype.

    sequences     i64[N], the sequence of each row, for an objective that needs whole sequences; policy_pass ignores it
    grad_row_eps  rows whose gradient bound (`row_bound`) is at most this skip the backward GEMMs; None: no row does
    """

    objective: PolicyObjective
    entropy_coef: float | Tensor
    advantages: Tensor
    token_weight: Tensor
    old_logp: Tensor | None = None
    rollout_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sequences: Tensor | None = None
    grad_row_eps: float | None = None

    def pick(self, index: slice | Tensor) -> "PolicyRows":
        """Return the rows that a slice or an index tensor selects."""
        optional = ("old_logp", "rollout_logp", "ref_logp", "sequences")
        given = {name: x for name in optional if (x := getattr(self, name)) is not None}
        return replace(
            self,
            advantages=self.advantages[index],
            token_weight=self.token_weight[index],
            **{name: x[index] for name, x in given.items()},
        )

    def terms(self, logp_N: Tensor) -> TokenLoss:
        """Return loss and slope of every row; see objective.token_loss."""
        return token_loss(
            self.objective,
            logp_N,
            self.advantages,
            old_logp_N=self.old_logp,
            rollout_logp_N=self.rollout_logp,
            ref_logp_N=self.ref_logp,
        )

    def slopes(self, c: slice, stats: RowStats) -> chunked.Slopes:
        """Return dL/dlogp and dL/dentropy of rows c, given their statistics."""
        chunk = self.pick(c)
        weight_C, slope_C = chunk.token_weight, chunk.terms(stats.logp_C).slope_N
        keep_C = None
        if self.grad_row_eps is not None:
            keep_C = ~negligible(weight_C, self.row_bound(slope_C, stats), self.grad_row_eps)
        return chunked.Slopes(weight_C * slope_C, -weight_C * self.entropy_coef, keep_C)

    def constants(self, c: slice, one_sweep: bool) -> TokenConstants:
        """Return what a backend needs to compute the objective of rows c itself."""
        chunk = self.pick(c)
        return TokenConstants(
            self.objective,
            one_sweep,
            chunk.advantages,
            chunk.token_weight,
            -chunk.token_weight * self.entropy_coef,
            chunk.old_logp,
            chunk.rollout_logp,
            chunk.ref_logp,
        )

    def row_bound(self, slope_C: Tensor, stats: RowStats) -> Tensor:
        """Return an upper bound [C] on half the L1 norm of the gradient of a row's z, before token_weight.

        |dlogp/dz|_1 = 2 (1 - p_y), and |dH/dz|_1 = E|H + log p| <= 2 H because -log p is >= 0 with mean H.
        """
        coef = self.entropy_coef.abs() if isinstance(self.entropy_coef, Tensor) else abs(self.entropy_coef)
        return slope_C.abs() * -stats.logp_C.expm1() + coef * stats.entropy_C


def negligible(weight_C: Tensor, bound_C: Tensor, eps: float) -> Tensor:
    """Return bool[C], the rows that grad_row_eps drops. A nan bound keeps its row."""
    return (bound_C <= eps) | (weight_C == 0) & ~bound_C.isnan()


class PolicyPass(NamedTuple):
    """Result of policy_pass: loss [], per-row values [N], and gradients for dL = 1.

    left_out  upper bound on the L1 norm of dL/dlogits over the rows that grad_row_eps dropped, []; None without it
    grads     of hidden, weight and bias; None where not needed
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
    """Return loss, statistics and the gradients of (hidden, weight, bias) that `needs` asks for.

    Costs three GEMMs a chunk, or one if no gradient is needed.
    """
    wants_grads = any(needs) or main_grad_VH is not None
    if wants_grads:
        # fp16 alone needs a unit: slopes near 1 / tokens vanish in it.
        unit = wide.unit_of(rows.token_weight) if engine.gemms.operand == torch.float16 else None
        engine.want_grads(needs, main_grad_VH, unit)
        in_unit = rows if unit is None else replace(rows, token_weight=rows.token_weight / unit)
    if wants_grads and _in_one_call(engine, rows):
        # Without a bonus, and without a gradient of the bias, a factor of the row need not be known while it is swept.
        one_sweep = _is_zero(rows.entropy_coef) and not needs[2] and engine.gemms.operand != torch.float16
        done = chunked.policy_and_grads(engine, inputs, lambda c: in_unit.constants(c, one_sweep))
        loss = (rows.token_weight * (done.loss - rows.entropy_coef * done.entropy)).sum()
        grads = _grads(engine, main_grad_VH)
        return PolicyPass(loss, done.logp, done.entropy, done.ratio, done.clipped, None, grads)
    if wants_grads:
        stats = chunked.score_and_grads(engine, inputs, in_unit.slopes)
    else:
        stats, _ = chunked.score(engine, inputs)
    terms = rows.terms(stats.logp_C)
    loss = (rows.token_weight * (terms.loss_N - rows.entropy_coef * stats.entropy_C)).sum()
    left_out = None
    if rows.grad_row_eps is not None:
        bound_N = rows.row_bound(terms.slope_N, stats)
        scale_N = 2 * engine.settings.transform.scale * inputs.inv_tau * rows.token_weight.abs()
        dropped_N = negligible(rows.token_weight, bound_N, rows.grad_row_eps)
        left_out = torch.where(dropped_N & (rows.token_weight != 0), scale_N * bound_N, 0.0).sum()
    return PolicyPass(
        loss=loss,
        logp=stats.logp_C,
        entropy=stats.entropy_C,
        ratio=terms.ratio_N,
        clipped=terms.clipped_N,
        left_out=left_out,
        grads=_grads(engine, main_grad_VH),
    )


def _in_one_call(engine: chunked.Engine, rows: PolicyRows) -> bool:
    """Return True if the backend computes the objective between its passes and nothing else must happen there."""
    settings = engine.settings
    return settings.backend.policy_rows_ is not None and settings.shard is None and rows.grad_row_eps is None


def _is_zero(entropy_coef: float | Tensor) -> bool:
    # A tensor may be on a GPU, and the host must not wait for its value.
    return not isinstance(entropy_coef, Tensor) and entropy_coef == 0


def _grads(engine: chunked.Engine, main_grad_VH: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dhidden, dweight, dbias = engine.grads()
    return dhidden, None if main_grad_VH is not None else dweight, dbias
