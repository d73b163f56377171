"""Row passes in Triton: one program a row, the row streamed in blocks, statistics in fp32.

Pass 1 keeps a running maximum, sum and moment in every lane. It joins the lanes once, at the end of the row, so the
loop has no barrier. Pass 2 overwrites the logits with their gradient. A bf16 gradient fills the first half of the same
row, where a later block stores over logits that an earlier block loaded. A barrier therefore separates each block's
loads from its stores. Offsets are 64-bit, because rows * vocab exceeds 2^31 at ordinary sizes.

Legend: C rows of a chunk, V vocab, B columns of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .stats import RowStats, RowSums, Transform

INTERPRETED = triton.knobs.runtime.interpret

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# stats.D_FLOOR, as a Triton constant.
_FLOOR = tl.constexpr(-1.0e4)


@triton.jit
def _tanh(u):
    t = tl.exp2(tl.abs(u) * -2.8853900817779268)  # exp(-2 |u|)
    far = (1 - t) / (1 + t)
    s = u * u
    p = (
        ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
    ) * s - 3.33332819422e-1
    return tl.where(tl.abs(u) < 0.625, u + u * s * p, tl.where(u < 0, -far, far))


@triton.jit
def _capped(raw, scale, softcap, CAPPED: tl.constexpr):
    """Return z. Without a cap the scale is left to the caller, who folds it into a factor of every difference."""
    if CAPPED:
        raw = _tanh(raw * (scale / softcap)) * softcap
    return raw


@triton.jit
def _floored(d):
    # A nan must stay a nan. -inf must not: times its own exp, 0, the product would be one.
    return tl.maximum(d, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lanes(x_B, LANES: tl.constexpr):
    # The order of a thread's own elements: 128-bit loads of 4, one after the other. Reductions over the outer axes
    # then stay in the thread.
    return tl.reshape(x_B, [x_B.shape[0] // (4 * LANES), LANES, 4])


@triton.jit
def _is_column(y, R: tl.constexpr, LANES: tl.constexpr):
    """Return bool[R, LANES, 4], true for column y of a block."""
    # Compared with y less the lane's own offset, the columns of a thread are constants and need no registers.
    column_R14 = tl.arange(0, R)[:, None, None] * (4 * LANES) + tl.arange(0, 4)[None, None, :]
    y_L = y - 4 * tl.arange(0, LANES)
    return column_R14 == y_L[None, :, None]


@triton.jit
def _lane_max(x_RL4):
    return tl.max(tl.max(x_RL4, 2), 0)


@triton.jit
def _lane_sum(x_RL4):
    return tl.sum(tl.sum(x_RL4, 2), 0)


@triton.jit
def _shifted(z, peak, rate):
    """Return (z - peak) in base 2: exp d = exp2 of it. A peak of -inf, a lane without a number yet, counts as 0."""
    offset = tl.where(peak == -float("inf"), 0.0, peak)
    return _floored((z - offset) * rate)


@triton.jit
def _sum_block(z_B, y, rate, peak_L, rest_L, moment_L, LANES: tl.constexpr):
    """Add a block to each lane's running maximum, sum and moment. y is relative to the block."""
    z_RL4 = _lanes(z_B, LANES)
    new_L = tl.maximum(peak_L, _lane_max(z_RL4))
    shift_L = _shifted(peak_L, new_L, rate)
    d_RL4 = _shifted(z_RL4, new_L[None, :, None], rate)
    e_RL4 = tl.where(_is_column(y, z_RL4.shape[0], LANES), 0.0, tl.exp2(d_RL4))
    keep_L = tl.exp2(shift_L)
    moment_L = keep_L * (moment_L + shift_L * rest_L) + _lane_sum(e_RL4 * d_RL4)
    return new_L, keep_L * rest_L + _lane_sum(e_RL4), moment_L


@triton.jit
def _load_z(logits_V, start, vocab, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of z, -inf behind the row."""
    v_B = start + tl.arange(0, BLOCK)
    if MASKED:
        raw_B = tl.load(logits_V + v_B, mask=v_B < vocab, other=0.0)
        z_B = tl.where(v_B < vocab, _capped(raw_B, scale, softcap, CAPPED), -float("inf"))
    else:
        z_B = _capped(tl.load(logits_V + v_B), scale, softcap, CAPPED)
    return z_B


@triton.jit
def _row_sums(
    logits_V, y, first, vocab, scale, rate, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):
    """Return peak, rest and moment (in base 2) of columns from `first`, without the target."""
    peak_L = tl.full([LANES], -float("inf"), tl.float32)
    rest_L = tl.zeros([LANES], tl.float32)
    moment_L = tl.zeros([LANES], tl.float32)
    whole = first + (vocab - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        z_B = _load_z(logits_V, start, vocab, scale, softcap, CAPPED, False, BLOCK)
        peak_L, rest_L, moment_L = _sum_block(z_B, y - start, rate, peak_L, rest_L, moment_L, LANES)
    if whole < vocab:
        z_B = _load_z(logits_V, whole, vocab, scale, softcap, CAPPED, True, BLOCK)
        peak_L, rest_L, moment_L = _sum_block(z_B, y - whole, rate, peak_L, rest_L, moment_L, LANES)
    peak = tl.max(peak_L, 0)
    shift_L = _shifted(peak_L, peak, rate)
    keep_L = tl.exp2(shift_L)
    return peak, tl.sum(keep_L * rest_L, 0), tl.sum(keep_L * (moment_L + shift_L * rest_L), 0)


@triton.jit
def row_sums_kernel(
    logits_CV,
    targets_C,
    inv_tau_C,
    out_4C,
    stride,
    num_rows,
    vocab,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_CV + row * stride
    y = tl.load(targets_C + row).to(tl.int32)
    inv_tau = tl.load(inv_tau_C + row)
    # Without a cap the scale is a factor of every difference, so no element is multiplied by it.
    factor = 1.0 if CAPPED else scale
    rate = inv_tau * factor * _LOG2E
    peak, rest, moment = _row_sums(logits_V, y, 0, vocab, scale, rate, softcap, CAPPED, BLOCK, LANES)
    target = tl.load(logits_V + y, mask=y >= 0, other=-float("inf"))
    if CAPPED:
        target = tl.where(y >= 0, _capped(target, scale, softcap, CAPPED), -float("inf"))
    d = _shifted(target, peak, rate)
    tl.store(out_4C + row, peak * factor)
    tl.store(out_4C + num_rows + row, target * factor)
    tl.store(out_4C + 2 * num_rows + row, rest)
    tl.store(out_4C + 3 * num_rows + row, (moment + d * tl.exp2(d)) * _LN2)


@triton.jit
def _missing(logp):
    """Return 1 - p_y, by its series where the difference would cancel."""
    series = -logp * (1 + logp * (0.5 + logp * (0.16666667 + logp * 0.041666668)))
    return tl.where(logp > -0.03, series, 1 - tl.exp2(logp * _LOG2E))


@triton.jit
def _grad_block(
    logits_V, out_V, start, row, chain, shape, CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Overwrite a block of logits with its gradient: p (a + b log2 p), and `own` in column y."""
    y, own, peak, log_norm, a, b = row
    scale, rate, softcap = chain
    vocab = shape
    v_B = start + tl.arange(0, BLOCK)
    z_B = _load_z(logits_V, start, vocab, scale, softcap, CAPPED, MASKED, BLOCK)
    tl.debug_barrier()
    log_p_B = _floored((z_B - peak) * rate - log_norm)
    dz_B = tl.exp2(log_p_B) * (a + b * log_p_B)
    dz_B = tl.where(tl.arange(0, BLOCK) == y - start, own, dz_B)
    if CAPPED:
        u_B = z_B * (1 / softcap)
        dz_B = dz_B * (1 - u_B * u_B)
    draw_B = dz_B.to(out_V.dtype.element_ty)
    if MASKED:
        tl.store(out_V + v_B, draw_B, mask=v_B < vocab)
    else:
        tl.store(out_V + v_B, draw_B)


@triton.jit
def _row_grads(logits_V, out_V, vocab, row, slopes, chain, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Overwrite a row with its gradient. row: y, logp, entropy, peak (as _capped gives it), log_norm, in nats."""
    y, logp, entropy, peak, log_norm = row
    g, k = slopes
    scale, rate, softcap, unit = chain
    own = (g * _missing(logp) - k * tl.exp2(logp * _LOG2E) * _floored(logp + entropy)) * unit
    a, b = -(g + k * entropy) * unit, -k * unit * _LN2
    inner = (y, own, peak, log_norm * _LOG2E, a, b)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _grad_block(logits_V, out_V, start, inner, (scale, rate, softcap), vocab, CAPPED, False, BLOCK)
    if whole < vocab:
        _grad_block(logits_V, out_V, whole, inner, (scale, rate, softcap), vocab, CAPPED, True, BLOCK)


@triton.jit
def row_grads_kernel(
    logits_CV,
    out_CV,
    targets_C,
    inv_tau_C,
    stats_4C,
    slopes_2C,
    stride,
    out_stride,
    num_rows,
    vocab,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets_C + row).to(tl.int32)
    inv_tau = tl.load(inv_tau_C + row)
    logp, entropy = tl.load(stats_4C + row), tl.load(stats_4C + num_rows + row)
    peak, log_norm = tl.load(stats_4C + 2 * num_rows + row), tl.load(stats_4C + 3 * num_rows + row)
    slopes = (tl.load(slopes_2C + row), tl.load(slopes_2C + num_rows + row))
    factor = 1.0 if CAPPED else scale
    chain = (scale, inv_tau * factor * _LOG2E, softcap, inv_tau * scale)
    stats = (y, logp, entropy, peak / factor, log_norm)
    _row_grads(logits_CV + row * stride, out_CV + row * out_stride, vocab, stats, slopes, chain, CAPPED, BLOCK)


# 16 elements a thread: enough loads in flight to hide memory latency, at most 48 registers. Pass 1 keeps one running
# maximum a thread (LANES), so that 16 elements share one rescaling.
BLOCK, NUM_WARPS = 4096, 8
LANES = 32 * NUM_WARPS


def row_sums(logits_CV: Tensor, targets_C: Tensor, inv_tau_C: Tensor, transform: Transform) -> RowSums:
    """Run plain.row_sums for f32 logits with adjacent columns."""
    num_rows, vocab = logits_CV.shape
    out_4C = torch.empty(4, num_rows, dtype=torch.float32, device=logits_CV.device)
    # Triton launches on the current device, not on the tensors' device.
    with torch.cuda.device_of(logits_CV):
        row_sums_kernel[(num_rows,)](
            logits_CV,
            targets_C.contiguous(),
            inv_tau_C.contiguous(),
            out_4C,
            logits_CV.stride(0),
            num_rows,
            vocab,
            transform.scale,
            transform.softcap or 1.0,
            CAPPED=transform.softcap is not None,
            BLOCK=BLOCK,
            LANES=LANES,
            num_warps=NUM_WARPS,
        )
    return RowSums(*out_4C)


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
    """Run plain.row_grads_ for contiguous f32 logits. out_dtype bf16 returns a [C, V] view of row stride 2 V."""
    num_rows, vocab = logits_CV.shape
    out_CV = logits_CV if out_dtype in (None, torch.float32) else logits_CV.view(out_dtype)[:, :vocab]
    with torch.cuda.device_of(logits_CV):
        row_grads_kernel[(num_rows,)](
            logits_CV,
            out_CV,
            targets_C.contiguous(),
            inv_tau_C.contiguous(),
            torch.stack(stats),
            torch.stack(slopes),
            logits_CV.stride(0),
            out_CV.stride(0),
            num_rows,
            vocab,
            transform.scale,
            transform.softcap or 1.0,
            CAPPED=transform.softcap is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return out_CV
