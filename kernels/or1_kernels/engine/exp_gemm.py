"""The policy loss of a chunk from a GEMM 1 that writes exponentials and partial sums instead of logits.

Row n has the rate c = scale / tau / ln 2 and a shift s near c z_y. The epilogue of the GEMM leaves, with d_v in base 2:

    d_v = c z_v - s,   E_v = 2^d_v in bf16,   sum_v E_v and sum_v d_v E_v of every tile of columns,   E_y in fp32

Any shift gives the same results, because all of them are ratios. The sums take E before its rounding to bf16. Let
rest = sum_{v != y} E_v and f = -g scale / tau / (rest + E_y). The gradient is draw_v = f E_v, and draw_y = -f rest.
GEMMs 2 and 3 read E and apply f to the rows of their other operand. Logits never reach memory, and no pass runs over
them.

The sum of the target's own tile less E_y loses the digits of 1 - p_y as p_y -> 1. There the rounded E of this tile are
added again: their relative error is 2^-9 however small they are. A target more than 44 nats below some logit makes
sums and E too large. Such rows are computed again from their hidden states, with the maximum as the shift.

Legend: C rows of a chunk, H hidden, V vocab, T tiles of columns, B columns of one tile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..objective import token_loss
from ..rows import PolicyDraw, RowSums, TokenConstants, finish

if TYPE_CHECKING:
    from .chunked import RowInputs

LOG2E = 1 / math.log(2)
# E of a row at most 2^64 in sum: products and sums of GEMM 2 stay far below the largest fp32.
_HIGHEST = 2.0**64
# Below this part of E_y, the rounded E of the target's tile are more exact than a difference of sums.
_SMALL = 2.0**-12


class ExpRows(NamedTuple):
    """The rows of a chunk: hidden [C, H]; targets i64[C]; rate c and shift s of each row, f32[C]."""

    hidden_CH: Tensor
    targets_C: Tensor
    rate_C: Tensor
    shift_C: Tensor


class Partials(NamedTuple):
    """What the epilogue leaves beside E, all fp32.

    sums, moments  [C, T], sum E_v and sum d_v E_v over the columns of each tile
    own            [C], E of the target
    """

    sums_CT: Tensor
    moments_CT: Tensor
    own_C: Tensor


class ExpGemm(Protocol):
    """An implementation of GEMM 1 with this epilogue."""

    def why_not(self, weight_VH: Tensor) -> str | None:
        """Return the reason why it cannot multiply with this weight, None if it can."""
        ...

    def product(self, rows: ExpRows, weight_VH: Tensor, e_CV: Tensor) -> Partials:
        """Write bf16 E to e_CV, which is contiguous, and return the partial sums. Every tile is whole."""
        ...

    def redo(self, rows: ExpRows, weight_VH: Tensor, far: FarRows) -> None:
        """Compute the rows where `far.far_C` is true again, in place, without a wait of the host."""
        ...


class FarRows(NamedTuple):
    """A chunk whose far rows must be computed again, with the maximum as the shift.

    far              bool[C]
    e                bf16 [C, V]
    d, rest, moment  f32 [C]: d of the target in nats, sum_{v != y} E_v, and sum_v d_v E_v in nats with the target
    """

    far_C: Tensor
    e_CV: Tensor
    d_C: Tensor
    rest_C: Tensor
    moment_C: Tensor


def policy_rows(
    gemm: ExpGemm, inputs: RowInputs, weight_VH: Tensor, scale: float, constants: TokenConstants, e_CV: Tensor
) -> PolicyDraw:
    """Return statistics, objective and dL/draw of a chunk without an entropy bonus, dL/draw as bf16 E in e_CV.

    scale  factor of the logits; there is neither a softcap nor a bias
    """
    hidden_CH, targets_C, inv_tau_C = inputs
    rate_C = inv_tau_C * (scale * LOG2E)
    # Near c z_y is enough, so the product may be rounded.
    shift_C = (hidden_CH * weight_VH[targets_C]).sum(1, dtype=torch.float32) * rate_C
    rows = ExpRows(hidden_CH, targets_C, rate_C, shift_C)
    out = gemm.product(rows, weight_VH, e_CV)
    # A nan is neither large nor small: `redo` finds where it comes from, and keeps it.
    far_C = ~(out.sums_CT.amax(1) < _HIGHEST)
    far = FarRows(far_C, e_CV, out.own_C.log(), _rest(out, targets_C, e_CV), out.moments_CT.sum(1) / LOG2E)
    gemm.redo(rows, weight_VH, far)
    return _finish(far, targets_C, inv_tau_C * scale, constants)


def _rest(out: Partials, targets_C: Tensor, e_CV: Tensor) -> Tensor:
    """Return sum_{v != y} E_v, [C]."""
    size = e_CV.shape[1] // out.sums_CT.shape[1]
    targets_C1 = targets_C[:, None]
    tile_C1 = targets_C1 // size
    column_CB = tile_C1 * size + torch.arange(size, device=targets_C.device)
    near_C = torch.where(column_CB == targets_C1, 0.0, e_CV.gather(1, column_CB).float()).sum(1)
    less_C = out.sums_CT.gather(1, tile_C1)[:, 0] - out.own_C
    others_C = out.sums_CT.scatter(1, tile_C1, 0.0).sum(1)
    return others_C + torch.where(near_C < _SMALL * out.own_C, near_C, less_C)


def _finish(rows: FarRows, targets_C: Tensor, rate_C: Tensor, constants: TokenConstants) -> PolicyDraw:
    """Return the result for complete sums; rate: scale / tau. Writes the targets' column of E."""
    zeros_C = torch.zeros_like(rows.d_C)
    stats = finish(RowSums(zeros_C, rows.d_C, rows.rest_C, rows.moment_C), torch.ones_like(zeros_C))
    logs = {"old_logp_N": constants.old_C, "rollout_logp_N": constants.rollout_C, "ref_logp_N": constants.ref_C}
    terms = token_loss(constants.objective, stats.logp_C, constants.advantages_C, **logs)
    factor_C = -constants.weight_C * terms.slope_N * rate_C / (rows.rest_C + rows.d_C.exp())
    rows.e_CV.scatter_(1, targets_C[:, None], -rows.rest_C[:, None].to(rows.e_CV.dtype))
    return PolicyDraw(stats.logp_C, stats.entropy_C, terms.loss_N, terms.ratio_N, terms.clipped_N, rows.e_CV, factor_C)
