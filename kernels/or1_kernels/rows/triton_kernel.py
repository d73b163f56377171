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
def _transformed(raw, scale, softcap, CAPPED: tl.constexpr):
    z = raw * scale
    if CAPPED:
        z = _tanh(z / softcap) * softcap
    return z


@triton.jit
def _floored(d):
    # where, not maximum: a nan must stay nan.
    return tl.where(d < _FLOOR, _FLOOR, d)


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
):
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_CV + row * stride
    y = tl.load(targets_C + row)
    inv_tau = tl.load(inv_tau_C + row)
    peak_B = tl.full([BLOCK], -float("inf"), tl.float32)
    rest_B = tl.zeros([BLOCK], tl.float32)
    moment_B = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        v_B = start + tl.arange(0, BLOCK)
        raw_B = tl.load(logits_V + v_B, mask=v_B < vocab, other=-float("inf"))
        z_B = tl.where(v_B < vocab, _transformed(raw_B, scale, softcap, CAPPED), -float("inf"))
        new_B = tl.where(z_B > peak_B, z_B, peak_B)
        # A lane that saw only -inf has no maximum yet. Offset 0 gives -inf - 0 = -inf; -inf - -inf would be nan.
        offset_B = tl.where(new_B == -float("inf"), 0.0, new_B)
        shift_B = _floored((peak_B - offset_B) * inv_tau)
        d_B = _floored((z_B - offset_B) * inv_tau)
        e_B = tl.where((v_B < vocab) & (v_B != y), tl.exp2(d_B * _LOG2E), 0.0)
        keep_B = tl.exp2(shift_B * _LOG2E)
        moment_B = keep_B * (moment_B + shift_B * rest_B) + e_B * d_B
        rest_B = keep_B * rest_B + e_B
        peak_B = new_B
    peak = tl.max(peak_B, 0)
    shift_B = _floored((peak_B - peak) * inv_tau)
    keep_B = tl.exp2(shift_B * _LOG2E)
    moment = tl.sum(keep_B * (moment_B + shift_B * rest_B), 0)
    rest = tl.sum(keep_B * rest_B, 0)
    target = tl.load(logits_V + y, mask=y >= 0, other=-float("inf"))
    if y >= 0:
        target = _transformed(target, scale, softcap, CAPPED)
    d = _floored((target - peak) * inv_tau)
    tl.store(out_4C + row, peak)
    tl.store(out_4C + num_rows + row, target)
    tl.store(out_4C + 2 * num_rows + row, rest)
    tl.store(out_4C + 3 * num_rows + row, moment + d * tl.exp2(d * _LOG2E))


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
    logits_V, out_V = logits_CV + row * stride, out_CV + row * out_stride
    y = tl.load(targets_C + row)
    inv_tau = tl.load(inv_tau_C + row)
    logp, entropy = tl.load(stats_4C + row), tl.load(stats_4C + num_rows + row)
    peak, log_norm = tl.load(stats_4C + 2 * num_rows + row), tl.load(stats_4C + 3 * num_rows + row)
    g, k = tl.load(slopes_2C + row), tl.load(slopes_2C + num_rows + row)
    p_y = tl.exp2(logp * _LOG2E)
    # 1 - p_y, by its series where the difference would cancel.
    missing = tl.where(logp > -0.03, -logp * (1 + logp * (0.5 + logp * (0.16666667 + logp * 0.041666668))), 1 - p_y)
    own = g * missing - k * p_y * _floored(logp + entropy)
    for start in range(0, vocab, BLOCK):
        v_B = start + tl.arange(0, BLOCK)
        raw_B = tl.load(logits_V + v_B, mask=v_B < vocab, other=0.0)
        tl.debug_barrier()
        z_B = _transformed(raw_B, scale, softcap, CAPPED)
        log_p_B = _floored((z_B - peak) * inv_tau - log_norm)
        dz_B = -tl.exp2(log_p_B * _LOG2E) * (g + k * (log_p_B + entropy))
        dz_B = tl.where(v_B == y, own, dz_B) * (inv_tau * scale)
        if CAPPED:
            u_B = z_B / softcap
            dz_B = dz_B * (1 - u_B * u_B)
        tl.store(out_V + v_B, dz_B.to(out_CV.dtype.element_ty), mask=v_B < vocab)


# 16 elements a thread: enough loads in flight to hide memory latency, few enough registers for 8 programs an SM.
BLOCK, NUM_WARPS = 4096, 8


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
            BLOCK=_block(vocab),
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
            BLOCK=_block(vocab),
            num_warps=NUM_WARPS,
        )
    return out_CV


def _block(vocab: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocab))
