"""The three-way check of a candidate: its error against fp64, in units of the error of plain torch in its own dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]


def error_of(mine: Outputs, plain: Outputs, truth: Outputs) -> float:
    """Return the largest error of any output and norm; infinite for a result that is not finite or has another shape.

    Two units of rounding of the result's scale are allowed in any case, 64 in fp64: plain torch may be exact by chance.
    """
    worst = 0.0
    for name, want in truth.items():
        got, same = mine.get(name), plain[name]
        if got is None or got.shape != want.shape or not bool(got.isfinite().all()):
            return float("inf")
        if not want.numel():
            continue
        # Plain torch in fp64 is the reference itself, whose own error is unknown.
        floor = (64 if same.dtype == torch.float64 else 2) * torch.finfo(got.dtype).eps * float(want.abs().max())
        for norm in (float("inf"), 2.0):
            error, unit = (_distance(each, want, norm) for each in (got, same))
            # As in the tests of the kernels: error <= 2 * unit + allowed.
            allowed = floor if norm == float("inf") else floor * want.numel() ** 0.5 / 4
            scale = unit + allowed / 2
            worst = max(worst, error / scale if scale > 0 else (0.0 if error == 0 else float("inf")))
    return worst


def _distance(got: Tensor, want: Tensor, norm: float) -> float:
    return float(torch.linalg.vector_norm(got.double() - want, norm))
