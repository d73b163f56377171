"""Boundaries of the documents of a packed row, on the device for kernels and on the host for Python."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# A tensor may carry attributes; the copy lives as long as the tensor, and a tensor made from it has no copy.
_COPY = "or1_host_copy"


def boundaries(lengths: list[int], device: torch.device | str) -> Tensor:
    """Return i32[S+1], cumulative counts of the documents from 0, with a copy on the host for `on_host`."""
    ends = [0, *np.cumsum(lengths).tolist()]
    bounds = torch.tensor(ends, dtype=torch.int32).to(device)
    setattr(bounds, _COPY, ends)
    return bounds


def on_host(bounds: Tensor) -> list[int]:
    """Return the values of a small tensor; the tensor is copied from the device only once.

    Every layer of a model asks for the boundaries of the same row, and each copy would wait for the GPU.
    """
    known: list[int] | None = getattr(bounds, _COPY, None)
    if known is None:
        known = bounds.tolist()
        setattr(bounds, _COPY, known)
    return known
