"""Which implementation of the two row passes runs: chosen by name or by device, never stumbled into."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import rows

IMPLS = ("auto", "triton", "native", "torch", "reference")


class Backend(NamedTuple):
    """The two passes of `rows`, and the name under which stats.impl reports them."""

    name: str
    row_sums: Callable[..., rows.RowSums]
    row_grads_: Callable[..., Tensor]


TORCH = Backend("torch", rows.row_sums, rows.row_grads_)


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for `impl`; "auto" takes the fastest one that can run.

    Raises ValueError for an unknown name and RuntimeError for an explicit choice that cannot run here.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {IMPLS}")
    if impl in ("auto", "torch"):
        return TORCH
    raise RuntimeError(f"impl={impl!r} cannot run on {device.type} with {dtype}; use impl='auto' or impl='torch'")
