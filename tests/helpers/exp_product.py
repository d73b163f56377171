"""What a GEMM with the epilogue of engine/exp_gemm leaves, in plain torch."""

import torch

from or1_kernels.engine.exp_gemm import Partials
from or1_kernels.rows import RowSums, finish

TILE = 32


class PlainExpGemm:
    """An `ExpGemm` on any device. `redone` counts the rows that were computed again."""

    def __init__(self):
        self.chunks = self.redone = 0

    def why_not(self, weight_VH):
        return "the last tile is not whole" if weight_VH.shape[0] % TILE else None

    def product(self, rows, weight_VH, e_CV):
        """Return fp32 sums taken before E is rounded, as in the epilogue, and E of the target, also before."""
        assert e_CV.dtype == torch.bfloat16 and e_CV.is_contiguous()
        self.chunks += 1
        d_CV = rows.hidden_CH.float() @ weight_VH.float().T * rows.rate_C[:, None] - rows.shift_C[:, None]
        exact_CV = d_CV.exp2()
        e_CV.copy_(exact_CV)
        tiles = (len(d_CV), -1, TILE)
        sums_CT, moments_CT = (x.reshape(tiles).sum(-1) for x in (exact_CV, exact_CV * d_CV))
        return Partials(sums_CT, moments_CT, exact_CV.gather(1, rows.targets_C[:, None])[:, 0])

    def redo(self, rows, weight_VH, far):
        """Compute the far rows as rows/triton_far does."""
        for i in far.far_C.nonzero()[:, 0].tolist():
            self.redone += 1
            u_V = (weight_VH.float() @ rows.hidden_CH[i].float()) * rows.rate_C[i] * torch.tensor(2.0).log()
            d_V = (u_V - u_V.max()).clamp_min(-1e4)
            y = rows.targets_C[i]
            far.d_C[i], far.moment_C[i] = d_V[y], (d_V.exp() * d_V).sum()
            far.rest_C[i] = d_V.exp().sum() - d_V[y].exp()
            far.e_CV[i] = d_V.exp()


def statistics(rows, weight_VH, inv_tau_C):
    """Return the fp64 statistics of rows."""
    z_CV = rows.hidden_CH.double() @ weight_VH.double().T * inv_tau_C.double()[:, None]
    peak_C, target_C = z_CV.amax(1), z_CV.gather(1, rows.targets_C[:, None])[:, 0]
    d_CV = z_CV - peak_C[:, None]
    rest_C = d_CV.exp().scatter(1, rows.targets_C[:, None], 0.0).sum(1)
    return finish(RowSums(peak_C, target_C, rest_C, (d_CV.exp() * d_CV).sum(1)), torch.ones_like(peak_C))
