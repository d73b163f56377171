"""What a measurement depends on: the device, its driver, versions, the shapes, and the explicit settings."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import or1
from or1.config import ModelConfig
from or1.tune.case import Case
from or1_kernels.rows import native

PINS = ("attention", "head_impl", "head_preset", "head_chunk_rows", "mlp_tile_tokens")
"""Settings of `[model]` whose explicit value leaves fewer candidates."""
# The attention backends that these packages bring.
_PACKAGES = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "quack-kernels")
_DRIVER = re.compile(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)\s")


def key_of(case: Case, model: ModelConfig) -> dict[str, Any]:
    """Return the key of a measurement, as JSON."""
    return {
        "device": device_of(case.device),
        "versions": {"or1": or1.__version__, "torch": torch.__version__} | _installed(),
        "case": case.as_json(),
        "pins": {name: getattr(model, name) for name in PINS},
    }


def device_of(kind: str) -> dict[str, Any]:
    """Return what identifies a GPU or CPU."""
    if kind == "cuda":
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        capability = f"{found.major}.{found.minor}"
        return {"kind": kind, "name": found.name, "capability": capability, "driver": _driver()}
    return {
        "kind": kind,
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "driver": "",
        "threads": torch.get_num_threads(),
        "native": native.AVAILABLE,
    }


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def _driver() -> str:
    """Return the version of NVIDIA's driver, or of the CUDA that it supports."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    if found := _DRIVER.search(text):
        return found[1]
    probe = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(probe()) if probe is not None else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{names[0] if names else platform.machine()}, {cores} cores"
