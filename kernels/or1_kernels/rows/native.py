"""Row passes in C++ (csrc/score_rows.cpp) for fp32 logits on a CPU, with AVX-512 or AVX2 where the machine has them.

Legend: C rows of a chunk, V vocab.
"""

from typing import Any

import torch
from torch import Tensor

from .stats import RowStats, RowSums, Transform

try:
    from or1_kernels import _native
except ImportError:  # The extension is not built: `choose` then picks another implementation.
    AVAILABLE = False
else:
    AVAILABLE = True


def row_sums(logits_CV: Tensor, targets_C: Tensor, inv_tau_C: Tensor, transform: Transform) -> RowSums:
    """Run plain.row_sums for f32 CPU logits with adjacent columns."""
    out = _native.row_sums(*_arrays(logits_CV, targets_C, inv_tau_C), *_scalars(transform))
    return RowSums(*torch.from_numpy(out))


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
    """Run plain.row_grads_ for f32 CPU logits with adjacent columns.

    bf16 gradients are a view of the logits' memory: element v of a row lies at byte 2 v of the row.
    """
    bf16 = out_dtype == torch.bfloat16
    scale, softcap, threads = _scalars(transform)
    _native.row_grads(
        *_arrays(logits_CV, targets_C, inv_tau_C),
        scale,
        softcap,
        torch.stack(stats).numpy(),
        torch.stack(slopes).numpy(),
        threads,
        bf16=bf16,
    )
    if bf16:
        return logits_CV.view(torch.bfloat16)[:, : logits_CV.shape[1]]
    return logits_CV if out_dtype is None else logits_CV.to(out_dtype)


def _arrays(logits_CV: Tensor, targets_C: Tensor, inv_tau_C: Tensor) -> tuple[Any, Any, Any]:
    return logits_CV.numpy(), targets_C.contiguous().numpy(), inv_tau_C.contiguous().numpy()


def _scalars(transform: Transform) -> tuple[float, float, int]:
    return transform.scale, transform.softcap or 0.0, torch.get_num_threads()
