"""Time and memory of a callable on a CPU or a GPU, and a stamp of the machine and versions.

Legend: N rows, C rows of a chunk, H hidden, V vocab.
"""

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.paths import ROOT
from or1_kernels.engine import host

PACKAGES = ("torch", "triton", "transformers", "trl", "verl", "liger-kernel", "cut-cross-entropy", "numpy")
PACKAGES += ("quack-kernels", "flash-attn", "flash-attn-4", "torchao")
# Bytes of logits that the bare GEMMs write at once: all on a GPU, a size that is cheap to allocate on a CPU.
_GEMM_BYTES = {"cuda": 12 << 30, "cpu": 128 << 20}


def synchronize(device: torch.device) -> None:
    """Wait until the GPU is idle. No-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(fn: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call in seconds, with an empty device queue before and after."""
    synchronize(device)
    began = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - began


def cpu_seconds(fn: Callable[[], object], device: torch.device) -> float:
    """Return CPU seconds of one call over all threads. Other processes hardly change this number."""
    began = time.process_time()
    fn()
    return time.process_time() - began


def wall_and_cpu_seconds(fn: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return `seconds` and `cpu_seconds` of the same call."""
    began = time.process_time()
    wall = seconds(fn, device)
    return wall, time.process_time() - began


def interleaved(
    fns: dict[str, Callable[[], object]], device: torch.device, rounds: int, warmup: int = 1, *, timer=seconds
) -> dict[str, list[Any]]:
    """Return `timer` of each function in every round. Functions alternate, so a load on the machine affects all."""
    for _ in range(warmup):
        for fn in fns.values():
            fn()
    times: dict[str, list[Any]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            times[name].append(timer(fn, device))
    return times


def peak_extra_bytes(fn: Callable[[], object], device: torch.device) -> int:
    """Return the peak of bytes in use during one call, minus the bytes in use before the call.

    On a GPU this is the allocator's count. On a CPU it is the resident set, whose high-water mark is reset through
    /proc/self/clear_refs. Call fn once before, so that libraries allocate their persistent buffers, and drop the
    results. Raises RuntimeError on a CPU without Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_freed_memory_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(f"cannot reset the resident set's high-water mark ({error}); this needs Linux") from error
    before = _status_bytes("VmRSS")
    fn()
    return max(0, _status_bytes("VmHWM") - before)


def bare_gemms(hidden_NH: Tensor, weight_VH: Tensor, only_logits: bool = False) -> Callable[[], None]:
    """Return a function that runs only the three GEMMs of a head, in the inputs' dtype, into existing buffers.

    only_logits: GEMM 1 alone, as for scoring.
    """
    hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
    num_rows, vocab = hidden_NH.shape[0], weight_VH.shape[0]
    step = max(1, min(num_rows, _GEMM_BYTES[hidden_NH.device.type] // (vocab * hidden_NH.element_size())))
    logits_CV = hidden_NH.new_zeros(step, vocab)
    dhidden_CH, dweight_VH = hidden_NH.new_zeros(step, hidden_NH.shape[1]), torch.zeros_like(weight_VH)

    @torch.no_grad()
    def run() -> None:
        for i, hidden_CH in enumerate(hidden_NH.split(step)):
            rows = len(hidden_CH)
            torch.mm(hidden_CH, weight_VH.T, out=logits_CV[:rows])
            if only_logits:
                continue
            torch.mm(logits_CV[:rows], weight_VH, out=dhidden_CH[:rows])
            torch.addmm(dweight_VH, logits_CV[:rows].T, hidden_CH, beta=int(i > 0), out=dweight_VH)

    return run


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Enable or disable TF32 for fp32 GEMMs on a GPU within the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def stamp() -> dict[str, object]:
    """Return commit, device, threads, versions and time, to be stored with every measurement."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": _commit(),
        "device": device_name(),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@cache
def device_name() -> str:
    """Return the GPU's name, or the CPU's name with its core count and vector instruction sets."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    flags = next((x for x in lines if x.startswith("flags")), "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{model}, {os.cpu_count()} CPUs, {' '.join(sets)}"


@cache
def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


@cache
def _commit() -> str:
    """Return the commit, with a "+" if files differ from the commit; "unknown" outside a git clone."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty.strip() else "")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory of a CPU run is measured on Linux only")


def _give_freed_memory_back() -> None:
    # Otherwise the call could reuse freed memory that is kept for it, and this would not be counted.
    host.free_spare()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
