"""Which implementation of the two row passes runs: chosen by name or by device, never stumbled into."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import native_rows, rows

IMPLS = ("auto", "triton", "native", "torch", "reference")


class Backend(NamedTuple):
    """The two passes of `rows`, and the name under which stats.impl reports them."""

    name: str
    row_sums: Callable[..., rows.RowSums]
    row_grads_: Callable[..., Tensor]


TORCH = Backend("torch", rows.row_sums, rows.row_grads_)
NATIVE = Backend("native", native_rows.row_sums, native_rows.row_grads_)


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for `impl`; "auto" takes the fastest one that can run: native on a CPU, else torch.

    Raises ValueError for an unknown name and RuntimeError for an explicit choice that cannot run here.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {IMPLS}")
    why_not = {"native": _why_not_native(device, dtype), "torch": None, "triton": "this version has no Triton passes"}
    if impl == "auto":
        return TORCH if why_not["native"] else NATIVE
    if why_not[impl] is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {why_not[impl]}; use impl='auto' to take what can")
    return {"native": NATIVE, "torch": TORCH}[impl]


def _why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    if not native_rows.AVAILABLE:
        return "the extension or1_kernels._native is not built (python setup.py build_ext --inplace)"
    if device.type != "cpu":
        return f"it is for the CPU and the tensors are on {device}"
    return "it computes in fp32 and the tensors are fp64" if dtype == torch.float64 else None
