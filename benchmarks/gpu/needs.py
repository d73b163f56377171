"""Libraries that a part needs: asked for before the part is imported, so that a missing one is one line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

WHEELS = "benchmarks/gpu/wheels.txt"
# Some messages of torch are one line of 2000 characters.
_LONGEST = 200
_REMEDIES = {
    "or1_kernels._native": "the C++ module is not built here (python setup.py build_ext --inplace, with a compiler)",
    "triton": "a GPU build of torch brings triton",
}


def why_not(modules: Sequence[str]) -> str | None:
    """Return the reason why the first of `modules` cannot be imported, on one line; None if all can."""
    for name in modules:
        try:
            importlib.import_module(name)
        # A wheel for another torch or Python fails in many ways, and each is a reason.
        except Exception as error:  # noqa: BLE001
            return f"cannot import {name}: {first_line(error)}; {remedy(name)}"
    return None


def remedy(module: str) -> str:
    """Return what to do about a missing module."""
    return _REMEDIES.get(module, f"bring its wheel (--wheels DIR; {WHEELS} lists them)")


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:_LONGEST]}" if lines else type(error).__name__
