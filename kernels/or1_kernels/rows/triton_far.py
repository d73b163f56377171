"""Rows of a fused GEMM whose target is far below the maximum, computed again in Triton: see engine/exp_gemm.

One program a row, which ends at once for a row that is not far, so the host need not know which rows are. A program
multiplies one hidden state with the whole weight, twice: for the statistics, and for E with the maximum as the shift.
It reads the weight twice, but an update on the model's own samples has no far row.

Legend: C rows of a chunk, H hidden, V vocab, B columns of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernel as t

_LN2 = tl.constexpr(0.6931471805599453)
_COLUMNS, _DEPTH = 64, 128


@triton.jit
def _logits(hidden_H, weight_VH, stride, start, vocab, width, rate, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Return rate * z of a block of columns, -inf behind the vocabulary."""
    v_B = start + tl.arange(0, BLOCK)
    u_B = tl.zeros([BLOCK], tl.float32)
    for k in range(0, width, DEPTH):
        k_D = k + tl.arange(0, DEPTH)
        h_D = tl.load(hidden_H + k_D, mask=k_D < width, other=0.0).to(tl.float32)
        where_BD = v_B.to(tl.int64)[:, None] * stride + k_D[None, :]
        w_BD = tl.load(weight_VH + where_BD, mask=(v_B < vocab)[:, None] & (k_D < width)[None, :], other=0.0)
        u_B += tl.sum(w_BD.to(tl.float32) * h_D[None, :], 1)
    return tl.where(v_B < vocab, u_B * rate, -float("inf"))


@triton.jit
def redo_kernel(
    hidden_CH,
    weight_VH,
    e_CV,
    targets_C,
    rate_C,
    far_C,
    d_C,
    rest_C,
    moment_C,
    hidden_stride,
    weight_stride,
    e_stride,
    vocab,
    width,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(far_C + row) != 0:
        hidden_H, e_V = hidden_CH + row * hidden_stride, e_CV + row * e_stride
        y, rate = tl.load(targets_C + row).to(tl.int32), tl.load(rate_C + row)
        peak, rest, moment, target = -1.0e30, 0.0, 0.0, 0.0
        for start in range(0, vocab, BLOCK):
            u_B = _logits(hidden_H, weight_VH, weight_stride, start, vocab, width, rate, BLOCK, DEPTH)
            own_B = start + tl.arange(0, BLOCK) == y
            target += tl.sum(tl.where(own_B, u_B, 0.0), 0)
            higher = tl.maximum(peak, tl.max(u_B, 0))
            shift = t._floored(peak - higher)
            keep = tl.exp2(shift)
            d_B = t._floored(u_B - higher)
            x_B = tl.where(own_B, 0.0, tl.exp2(d_B))
            moment = keep * (moment + shift * rest) + tl.sum(x_B * d_B, 0)
            rest = keep * rest + tl.sum(x_B, 0)
            peak = higher
        d = t._floored(target - peak)
        tl.store(d_C + row, d * _LN2)
        tl.store(rest_C + row, rest)
        tl.store(moment_C + row, (moment + tl.exp2(d) * d) * _LN2)
        for start in range(0, vocab, BLOCK):
            u_B = _logits(hidden_H, weight_VH, weight_stride, start, vocab, width, rate, BLOCK, DEPTH)
            v_B = start + tl.arange(0, BLOCK)
            x_B = tl.exp2(t._floored(u_B - peak))
            tl.store(e_V + v_B, x_B.to(e_CV.dtype.element_ty), mask=v_B < vocab)


def redo(hidden_CH: Tensor, targets_C: Tensor, rate_C: Tensor, weight_VH: Tensor, far: tuple[Tensor, ...]) -> None:
    """Compute the far rows of an `exp_gemm.FarRows` again, in place. rate: c of each row; weight is contiguous."""
    far_C, e_CV, d_C, rest_C, moment_C = far
    # A view of wider states has adjacent columns as well.
    hidden_CH = hidden_CH if hidden_CH.stride(1) == 1 else hidden_CH.contiguous()
    with torch.cuda.device_of(e_CV):
        redo_kernel[(len(hidden_CH),)](
            hidden_CH,
            weight_VH,
            e_CV,
            targets_C.contiguous(),
            rate_C,
            far_C.to(torch.int8),
            d_C,
            rest_C,
            moment_C,
            hidden_CH.stride(0),
            weight_VH.stride(0),
            e_CV.stride(0),
            *weight_VH.shape,
            BLOCK=_COLUMNS,
            DEPTH=_DEPTH,
        )
