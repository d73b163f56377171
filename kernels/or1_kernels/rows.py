"""The two passes over a chunk of raw logits between the GEMMs, in plain torch; and the scalar step that joins them.

With z = transformed logits, M = max_v z_v, d_v = (z_v - M) / tau and y the target:
    pass 1, row_sums      rest = sum_{v != y} exp d_v,   moment = sum_v d_v exp d_v,   M,   z_y
    finish                logp = -log1p(rest / exp d_y),   H = log_norm - moment / norm,   norm = rest + exp d_y
    pass 2, row_grads_    dz_v = -p_v (g + k (log p_v + H)) + g 1[v = y],   g = dL/dlogp, k = dL/dH
The target stays out of the sum, so 1 - p_y = -expm1(logp) is exact as p_y -> 1, where 1 minus a rounded p_y is 0.
The maximum as offset (and not z_y) keeps rows whose target lies far below the maximum exact in the same pass.

Legend: C rows of a chunk, V vocab, R rows of a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Below this, exp underflows to 0 in fp32 and fp64; d is floored here so that 0 * d is 0 and not nan for d = -inf.
D_FLOOR = -1.0e4
# Elements of one row tile: temporaries of this size stay in the last-level cache.
_TILE = 1 << 20


class Transform(NamedTuple):
    """How raw logits become z: softcap * tanh(scale * raw / softcap), or scale * raw without a softcap."""

    scale: float = 1.0
    softcap: float | None = None


class RowSums(NamedTuple):
    """Pass 1 over one vocabulary shard. peak: max z; target: z_y, or -inf where y lies in another shard."""

    peak_C: Tensor
    target_C: Tensor
    rest_C: Tensor
    moment_C: Tensor


class RowStats(NamedTuple):
    """logp and entropy in nats; peak and log_norm give log p_v = (z_v - peak) / tau - log_norm."""

    logp_C: Tensor
    entropy_C: Tensor
    peak_C: Tensor
    log_norm_C: Tensor


def finish(sums: RowSums, inv_tau_C: Tensor) -> RowStats:
    """Log-prob and entropy from the sums over the whole vocabulary; O(C)."""
    d_C = (sums.target_C - sums.peak_C) * inv_tau_C
    own_C = d_C.exp()
    norm_C = sums.rest_C + own_C
    # Near the maximum log1p keeps the digits of 1 - p_y; far below it own_C underflows and the plain form is exact.
    near_C = d_C > -1
    logp_C = torch.where(near_C, -(sums.rest_C / own_C).log1p(), d_C - norm_C.log())
    log_norm_C = torch.where(near_C, d_C - logp_C, norm_C.log())
    return RowStats(logp_C, log_norm_C - sums.moment_C / norm_C, sums.peak_C, log_norm_C)


def row_sums(logits_CV: Tensor, targets_C: Tensor, inv_tau_C: Tensor, transform: Transform) -> RowSums:
    """Pass 1. logits_CV f32 or f64, left as they are; targets_C i64, -1 where the target is in another shard."""
    outs = [_sums_of_tile(logits_CV[t], targets_C[t], inv_tau_C[t], transform) for t in _tiles(logits_CV)]
    return RowSums(*(torch.cat(parts) for parts in zip(*outs, strict=True)))


def row_grads_(
    logits_CV: Tensor,
    targets_C: Tensor,
    inv_tau_C: Tensor,
    transform: Transform,
    stats: RowStats,
    slopes: tuple[Tensor, Tensor],
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Pass 2: dL/draw [C, V] in out_dtype (None: the logits' own), in place of the raw logits, which are destroyed.

    slopes = (g_C, k_C) = (dL/dlogp, dL/dentropy).
    """
    for t in _tiles(logits_CV):
        tile = RowStats(*(x[t] for x in stats))
        _grads_of_tile(logits_CV[t], targets_C[t], inv_tau_C[t], transform, tile, (slopes[0][t], slopes[1][t]))
    return logits_CV if out_dtype is None else logits_CV.to(out_dtype)


def _tiles(logits_CV: Tensor) -> list[slice]:
    num_rows, vocab = logits_CV.shape
    step = max(1, _TILE // vocab)
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


def _apply(raw_RV: Tensor, transform: Transform) -> Tensor:
    z_RV = raw_RV if transform.scale == 1 else raw_RV * transform.scale
    if transform.softcap is None:
        return z_RV
    return (z_RV / transform.softcap).tanh_().mul_(transform.softcap)


def _sums_of_tile(raw_RV: Tensor, targets_R: Tensor, inv_tau_R: Tensor, transform: Transform) -> RowSums:
    z_RV = _apply(raw_RV, transform)
    here_R, index_R1 = targets_R >= 0, targets_R.clamp_min(0)[:, None]
    target_R = torch.where(here_R, z_RV.gather(1, index_R1).squeeze(1), -torch.inf)
    peak_R = z_RV.amax(1)
    d_RV = (z_RV - peak_R[:, None]).mul_(inv_tau_R[:, None]).clamp_min_(D_FLOOR)
    e_RV = d_RV.exp()
    moment_R = d_RV.mul_(e_RV).sum(1)
    e_RV.scatter_(1, index_R1, torch.where(here_R[:, None], 0.0, e_RV.gather(1, index_R1)))
    return RowSums(peak_R, target_R, e_RV.sum(1), moment_R)


def _grads_of_tile(
    raw_RV: Tensor,
    targets_R: Tensor,
    inv_tau_R: Tensor,
    transform: Transform,
    stats: RowStats,
    slopes: tuple[Tensor, Tensor],
) -> None:
    g_R, k_R = slopes
    z_RV = _apply(raw_RV, transform)
    logp_RV = (z_RV - stats.peak_C[:, None]).mul_(inv_tau_R[:, None])
    logp_RV.sub_(stats.log_norm_C[:, None]).clamp_min_(D_FLOOR)
    p_RV = logp_RV.exp()
    dz_RV = logp_RV.add_(stats.entropy_C[:, None]).mul_(k_R[:, None]).add_(g_R[:, None]).mul_(p_RV).neg_()
    own_R = -g_R * stats.logp_C.expm1() - k_R * stats.logp_C.exp() * (stats.logp_C + stats.entropy_C)
    here_R, index_R1 = targets_R >= 0, targets_R.clamp_min(0)[:, None]
    own_R = torch.where(here_R, own_R, dz_RV.gather(1, index_R1).squeeze(1))
    dz_RV.scatter_(1, index_R1, own_R[:, None]).mul_((inv_tau_R * transform.scale)[:, None])
    if transform.softcap is not None:
        dz_RV.mul_((z_RV / transform.softcap).square_().neg_().add_(1))
    raw_RV.copy_(dz_RV)
