"""Row passes in plain torch, a tile of rows at a time. The equations are in `or1_kernels.rows`.

Every other implementation is tested on this one.
Legend: C rows of a chunk, V vocab, R rows of a tile.
"""

import torch
from torch import Tensor

from .stats import D_FLOOR, RowStats, RowSums, Transform

# Elements of one row tile: temporaries of this size stay in the last-level cache.
_TILE = 1 << 20


def row_sums(logits_CV: Tensor, targets_C: Tensor, inv_tau_C: Tensor, transform: Transform) -> RowSums:
    """Run pass 1 over raw logits f32 or f64 [C, V], which are not changed.

    targets i64[C], -1 where another shard holds the target; inv_tau [C] = 1 / temperature, in the logits' dtype.
    """
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
    """Run pass 2: return dL/draw [C, V] in out_dtype (None: the logits' dtype). Overwrites the raw logits.

    slopes = (g_C, k_C) = (dL/dlogp, dL/dentropy); stats as returned by `stats.finish`.
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
