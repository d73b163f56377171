"""What is installed and what this machine has, as `or1 doctor` prints it. Imports nothing heavy to find out."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib import metadata
from typing import NamedTuple


class Line(NamedTuple):
    """One finding: `state` is "ok", "absent" (only some features need it) or "problem" (or1 does not run so)."""

    name: str
    state: str
    text: str


_REQUIRED = ("torch", "transformers", "safetensors", "numpy", "pyarrow", "pydantic", "math-verify", "rich",
             "tensorboard", "matplotlib")
_OPTIONAL = {
    "triton": "GPU kernels of the head", "liger-kernel": "fused norms", "flash-attn": "faster attention",
    "torchao": "8-bit moments", "trl": "or1's loss inside TRL", "verl": "or1's loss inside verl",
}  # fmt: skip


def machine_lines() -> list[Line]:
    """Python, processor and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [Line("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return [*lines, Line("machine", "ok", f"{cores} cores, {gib:.0f} GiB of memory")]
    return [*lines, Line("machine", "ok", f"{cores} cores")]


def package_lines() -> list[Line]:
    """Packages that or1 needs or can use, with versions."""
    lines = []
    for name in _REQUIRED:
        version = _version(name)
        lines.append(Line(name, "problem" if version is None else "ok", version or "missing; reinstall or1"))
    native = importlib.util.find_spec("or1_kernels._native")
    lines.append(Line("or1_kernels", "problem" if native is None else "ok",
                      "no native module; reinstall or1 with a C++17 compiler" if native is None else "native module"))
    for name, purpose in _OPTIONAL.items():
        version = _version(name)
        lines.append(Line(name, "absent" if version is None else "ok", version or f"not installed ({purpose})"))
    bubblewrap = shutil.which("bwrap")
    lines.append(Line("bubblewrap", "absent" if bubblewrap is None else "ok", bubblewrap or "not installed (sandbox)"))
    return lines


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
