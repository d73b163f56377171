"""The policy loss of a row and its gradient in one Triton program: no host and no second launch in between.

    two sweeps   sums, then log-prob, entropy, objective and slope, then the gradient while the row is in the L2 cache
    one sweep    without an entropy bonus: E_v = exp((z_v - z_y) / tau) replaces the logits as soon as a block is read

In the second form the slope and the norm are factors of the whole row. draw = factor * E, with E_y = -sum_{v != y} E_v,
and GEMMs 2 and 3 apply `factor` to the rows of their other operand.

A target far below the maximum would make E overflow. The program stops at the first such block. Blocks that are
written already are scaled by a power of two, which changes no digit; the others are swept from their logits.

Legend: C rows of a chunk, V vocab, B columns of a block, L lanes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernel as t
from .stats import PolicyDraw, TokenConstants, Transform
from .triton_objective import KINDS, cap_of, log, log1p, token_loss

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# E at most 2^64: products and sums of GEMM 2 stay far below the largest fp32.
_HIGHEST = tl.constexpr(64.0)


@triton.jit
def _finish(d, rest, moment):
    """Return logp, entropy, log_norm and norm in nats; d of the target and moment in base 2. See stats.finish."""
    own = tl.exp2(t._floored(d))
    norm = rest + own
    nats = d * _LN2
    logp = tl.where(d > -_LOG2E, -log1p(rest / own), nats - log(norm))
    log_norm = tl.where(d > -_LOG2E, nats - logp, log(norm))
    moment = (moment + t._floored(d) * own) * _LN2
    return logp, log_norm - moment / norm, log_norm, norm


@triton.jit
def _slope(
    logp,
    entropy,
    row,
    num_rows,
    per_row_6C,
    out_5C,
    constants,
    KIND: tl.constexpr,
    HAS_OLD: tl.constexpr,
    CAP: tl.constexpr,
    HAS_KL: tl.constexpr,
):
    """Store logp, entropy, loss, ratio and clipped of a row, and return dL/dlogp and dL/dentropy."""
    old, rollout, ref = 0.0, 0.0, 0.0
    if HAS_OLD:
        old = tl.load(per_row_6C + 3 * num_rows + row)
    if CAP != 0:
        rollout = tl.load(per_row_6C + 4 * num_rows + row)
    if HAS_KL:
        ref = tl.load(per_row_6C + 5 * num_rows + row)
    advantage = tl.load(per_row_6C + row)
    logs = (old, rollout, ref)
    loss, slope, ratio, clipped = token_loss(logp, advantage, logs, constants, KIND, HAS_OLD, CAP, HAS_KL)
    tl.store(out_5C + row, logp)
    tl.store(out_5C + num_rows + row, entropy)
    tl.store(out_5C + 2 * num_rows + row, loss)
    tl.store(out_5C + 3 * num_rows + row, ratio)
    tl.store(out_5C + 4 * num_rows + row, clipped.to(tl.float32))
    return tl.load(per_row_6C + num_rows + row) * slope, tl.load(per_row_6C + 2 * num_rows + row)


@triton.jit
def two_sweeps_kernel(
    logits_CV,
    out_CV,
    targets_C,
    inv_tau_C,
    per_row_6C,
    out_5C,
    stride,
    out_stride,
    num_rows,
    vocab,
    scale,
    softcap,
    low,
    high,
    kl_coef,
    is_floor,
    is_cap,
    CAPPED: tl.constexpr,
    KIND: tl.constexpr,
    HAS_OLD: tl.constexpr,
    CAP: tl.constexpr,
    HAS_KL: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_V, out_V = logits_CV + row * stride, out_CV + row * out_stride
    y, inv_tau = tl.load(targets_C + row).to(tl.int32), tl.load(inv_tau_C + row)
    factor = 1.0 if CAPPED else scale
    rate = inv_tau * factor * _LOG2E
    peak, rest, moment = t._row_sums(logits_V, y, 0, vocab, scale, rate, softcap, CAPPED, BLOCK, LANES)
    target = t._capped(tl.load(logits_V + y), scale, softcap, CAPPED)
    logp, entropy, log_norm, _ = _finish((target - peak) * rate, rest, moment)
    constants = (low, high, kl_coef, is_floor, is_cap)
    slopes = _slope(logp, entropy, row, num_rows, per_row_6C, out_5C, constants, KIND, HAS_OLD, CAP, HAS_KL)
    chain = (scale, rate, softcap, inv_tau * scale)
    # The target is read above, by every thread, before the first thread overwrites column y.
    tl.debug_barrier()
    t._row_grads(logits_V, out_V, vocab, (y, logp, entropy, peak, log_norm), slopes, chain, CAPPED, BLOCK)


@triton.jit
def _curved(e_B, z_B, softcap, CAPPED: tl.constexpr):
    """Return E times the slope of the softcap."""
    if CAPPED:
        u_B = z_B * (1 / softcap)
        e_B = e_B * (1 - u_B * u_B)
    return e_B


@triton.jit
def _sweep_block(
    rows,
    start,
    vocab,
    y,
    target,
    chain,
    sums,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Replace a block of logits by E, unless an E is too large. Return bool and the sums."""
    logits_V, out_V = rows
    scale, rate, softcap = chain
    rest_L, moment_L = sums
    z_B = t._load_z(logits_V, start, vocab, scale, softcap, CAPPED, MASKED, BLOCK)
    d_B = t._floored((z_B - target) * rate)
    # The maximum over the threads is also the fence between the loads of this block and its stores.
    fits = tl.max(d_B, 0) <= _HIGHEST
    if fits:
        tl.debug_barrier()
        v_B = start + tl.arange(0, BLOCK)
        d_RL4 = t._lanes(d_B, LANES)
        e_RL4 = tl.where(t._is_column(y - start, d_RL4.shape[0], LANES), 0.0, tl.exp2(d_RL4))
        rest_L += t._lane_sum(e_RL4)
        moment_L += t._lane_sum(e_RL4 * d_RL4)
        e_B = _curved(tl.reshape(e_RL4, [BLOCK]), z_B, softcap, CAPPED).to(out_V.dtype.element_ty)
        if MASKED:
            tl.store(out_V + v_B, e_B, mask=v_B < vocab)
        else:
            tl.store(out_V + v_B, e_B)
    return fits, rest_L, moment_L


@triton.jit
def _redo(rows, bound, vocab, y, target, chain, sums, CAPPED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Finish a row whose columns from `bound` on are still logits. Return d of the target, rest, moment and gain.

    The offset moves from the target to the maximum, and E moves by whole powers of two, so E is `gain` times exp d.
    """
    logits_V, out_V = rows
    scale, rate, softcap = chain
    rest, moment = sums
    peak, high_rest, high_moment = t._row_sums(logits_V, y, bound, vocab, scale, rate, softcap, CAPPED, BLOCK, LANES)
    d = (target - peak) * rate
    # Everything before `bound` is small against the peak. Of a target of -inf nothing is written yet.
    shift = tl.where(bound > 0, t._floored(d), 0.0)
    keep = tl.where(bound > 0, tl.exp2(shift), 0.0)
    rest, moment = high_rest + keep * rest, high_moment + keep * (moment + shift * rest)
    power = tl.ceil(-t._floored(d))
    gain = tl.exp2(-t._floored(d) - power)
    # Two halves, because 2^-power itself may be too small for a float while E 2^-power is not.
    half = tl.floor(power * 0.5)
    for start in range(0, bound, BLOCK):
        v_B = start + tl.arange(0, BLOCK)
        e_B = tl.load(out_V + v_B).to(tl.float32) * tl.exp2(-half) * tl.exp2(half - power)
        tl.store(out_V + v_B, e_B.to(out_V.dtype.element_ty))
    for start in range(bound, vocab, BLOCK):
        v_B = start + tl.arange(0, BLOCK)
        z_B = t._load_z(logits_V, start, vocab, scale, softcap, CAPPED, True, BLOCK)
        tl.debug_barrier()
        e_B = tl.exp2(t._floored((z_B - peak) * rate)) * gain
        tl.store(out_V + v_B, _curved(e_B, z_B, softcap, CAPPED).to(out_V.dtype.element_ty), mask=v_B < vocab)
    return d, rest, moment, gain


@triton.jit
def one_sweep_kernel(
    logits_CV,
    out_CV,
    targets_C,
    inv_tau_C,
    per_row_6C,
    out_5C,
    factor_C,
    stride,
    out_stride,
    num_rows,
    vocab,
    scale,
    softcap,
    low,
    high,
    kl_coef,
    is_floor,
    is_cap,
    CAPPED: tl.constexpr,
    KIND: tl.constexpr,
    HAS_OLD: tl.constexpr,
    CAP: tl.constexpr,
    HAS_KL: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = (logits_CV + row * stride, out_CV + row * out_stride)
    y, inv_tau = tl.load(targets_C + row).to(tl.int32), tl.load(inv_tau_C + row)
    factor = 1.0 if CAPPED else scale
    chain = (scale, inv_tau * factor * _LOG2E, softcap)
    target = t._capped(tl.load(rows[0] + y), scale, softcap, CAPPED)
    # The target is read above, by every thread, before the first thread overwrites column y.
    tl.debug_barrier()
    rest_L, moment_L = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    whole = vocab // BLOCK * BLOCK
    bound = 0
    fits = tl.abs(target) < float("inf")
    while fits & (bound < whole):
        sums = (rest_L, moment_L)
        fits, rest_L, moment_L = _sweep_block(rows, bound, vocab, y, target, chain, sums, CAPPED, False, BLOCK, LANES)
        bound += tl.where(fits, BLOCK, 0)
    if fits & (whole < vocab):
        sums = (rest_L, moment_L)
        fits, rest_L, moment_L = _sweep_block(rows, whole, vocab, y, target, chain, sums, CAPPED, True, BLOCK, LANES)
    rest, moment = tl.sum(rest_L, 0), tl.sum(moment_L, 0)
    d, gain = 0.0, 1.0
    if fits == 0:
        d, rest, moment, gain = _redo(rows, bound, vocab, y, target, chain, (rest, moment), CAPPED, BLOCK, LANES)
    logp, entropy, _, norm = _finish(d, rest, moment)
    constants = (low, high, kl_coef, is_floor, is_cap)
    g, _ = _slope(logp, entropy, row, num_rows, per_row_6C, out_5C, constants, KIND, HAS_OLD, CAP, HAS_KL)
    tl.store(factor_C + row, -g * (inv_tau * scale) / (norm * gain))
    # Another thread has stored 0 into column y.
    tl.debug_barrier()
    tl.store(rows[1] + y, _curved(-rest * gain, target, softcap, CAPPED).to(out_CV.dtype.element_ty))


def policy_rows_(
    logits_CV: Tensor,
    targets_C: Tensor,
    inv_tau_C: Tensor,
    transform: Transform,
    constants: TokenConstants,
    *,
    out_dtype: torch.dtype,
) -> PolicyDraw:
    """Return log-probs, objective and dL/draw of contiguous f32 logits, which are overwritten.

    constants.one_sweep selects the form without an entropy slope. A 2-byte out_dtype returns a [C, V] view of doubled
    row stride. Every target is in this vocabulary.
    """
    num_rows, vocab = logits_CV.shape
    out_CV = logits_CV if out_dtype == torch.float32 else logits_CV.view(out_dtype)[:, :vocab]
    out_5C = torch.empty(5, num_rows, dtype=torch.float32, device=logits_CV.device)
    objective = constants.objective
    factor_C = torch.empty_like(inv_tau_C) if constants.one_sweep else None
    tensors = (targets_C.contiguous(), inv_tau_C.contiguous(), constants.packed(), out_5C)
    kernel = two_sweeps_kernel if factor_C is None else one_sweep_kernel
    with torch.cuda.device_of(logits_CV):
        kernel[(num_rows,)](
            logits_CV,
            out_CV,
            *(tensors if factor_C is None else (*tensors, factor_C)),
            logits_CV.stride(0),
            out_CV.stride(0),
            num_rows,
            vocab,
            transform.scale,
            transform.softcap or 1.0,
            1 - objective.clip_low,
            1 + objective.clip_high,
            objective.kl_coef,
            objective.is_floor,
            objective.is_cap or 1.0,
            CAPPED=transform.softcap is not None,
            KIND=KINDS.index(objective.kind),
            HAS_OLD=constants.old_C is not None,
            CAP=cap_of(objective),
            HAS_KL=objective.kl_coef != 0,
            BLOCK=t.BLOCK,
            LANES=t.LANES,
            num_warps=t.NUM_WARPS,
        )
    logp_C, entropy_C, loss_C, ratio_C, clipped_C = out_5C
    return PolicyDraw(logp_C, entropy_C, loss_C, ratio_C, clipped_C != 0, out_CV, factor_C)
