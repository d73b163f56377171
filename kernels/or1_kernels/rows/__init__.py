"""Row passes: what happens to a chunk of raw logits between the GEMMs.

Let z = transformed logits, M = max_v z_v, d_v = (z_v - M) / tau, and let y be the target.

    pass 1, row_sums      rest = sum_{v != y} exp d_v,   moment = sum_v d_v exp d_v,   M,   z_y
    finish                logp = -log1p(rest / exp d_y),   H = log_norm - moment / norm,   norm = rest + exp d_y
    pass 2, row_grads_    dz_v = -p_v (g + k (log p_v + H)) + g 1[v = y],   g = dL/dlogp, k = dL/dH

Three choices keep digits. The sum leaves the target out, so 1 - p_y = -expm1(logp) is exact as p_y -> 1, where 1 minus
a rounded p_y is 0. The offset is the maximum and not z_y: a target far below the maximum stays exact in the same pass.
Statistics are fp32, or fp64 for fp64 inputs.

    stats           the data types, and `finish`
    plain           both passes in torch: the definition, exported here as row_sums and row_grads_
    native          the same in C++ on a CPU
    triton_kernel   the same in Triton on a GPU
    triton_policy   both passes and the objective in one Triton program a row
    choose          which of them runs

triton_kernel imports triton, so this module does not import it.
"""

from .choose import IMPLS, TORCH, Backend, resolve
from .plain import row_grads_, row_sums
from .stats import D_FLOOR, PolicyDraw, RowStats, RowSums, TokenConstants, Transform, finish

__all__ = [
    "D_FLOOR",
    "IMPLS",
    "TORCH",
    "Backend",
    "PolicyDraw",
    "RowStats",
    "RowSums",
    "TokenConstants",
    "Transform",
    "finish",
    "resolve",
    "row_grads_",
    "row_sums",
]
