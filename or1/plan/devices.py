"""Peak rates of devices from their data sheets, and the shares of the peaks that training is assumed to reach."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace

from or1.core.errors import PlanError

GIB = 2**30
# GB/s each way: 16 lanes of PCIe 4 in practice; a 400 Gbit/s network card a GPU.
_PCIE, _NETWORK = 25.0, 50.0
_GPUS_A_MACHINE = 8


@dataclass(frozen=True)
class Efficiency:
    """Assumed or measured shares of a device's peaks. All times that `or1 plan` prints depend on these shares.

    matmul             share of the arithmetic peak in matrix products of packed rows
    attention          share of the arithmetic peak in causal attention kernels (counting the useful half)
    memory             share of the bandwidth in passes that only move data
    engine_layer_s     least seconds of a vLLM decoding step per layer, to launch kernels
    engine_response_s  least seconds of a vLLM decoding step per running response, to schedule and sample

    head               share of the arithmetic peak in the LM head; None: that of matmul
    source             origin of measured shares; "" if all are assumed

    The engine's two are 0 if CUDA graphs and asynchronous scheduling hide both.
    """

    matmul: float = 0.70
    attention: float = 0.45
    memory: float = 0.80
    engine_layer_s: float = 0.0
    engine_response_s: float = 0.0
    head: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Device:
    """A GPU, or all cores of a CPU.

    tflops     dense bf16 TFLOP/s; fp32 for a CPU
    bandwidth  of the memory, in GB/s (1e9 bytes)
    memory     bytes, as the device reports them
    link       GB/s to another device of the same machine, each way
    reserved   bytes that a run cannot use: the driver's context, workspaces of libraries
    """

    name: str
    tflops: float
    bandwidth: float
    memory: int
    link: float
    reserved: int = GIB
    efficiency: Efficiency = Efficiency()

    def link_bytes(self, gpus: int) -> float:
        """Return the bytes/s of one of `gpus` devices in a collective, each way. A machine has up to 8 GPUs."""
        return 1e9 * (self.link if gpus <= _GPUS_A_MACHINE else min(self.link, _NETWORK)) * self.efficiency.memory

    @property
    def usable(self) -> int:
        """Bytes for tensors: the memory that is not reserved, minus 3 % that the allocator loses between blocks."""
        return int((self.memory - self.reserved) * 0.97)

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.name != "cpu"


def _gpu(name: str, tflops: float, bandwidth: float, gib: float, link: float = _PCIE) -> Device:
    return Device(name=name, tflops=tflops, bandwidth=bandwidth, memory=int(gib * GIB), link=link)


_GPUS = {
    d.name: d
    for d in (
        _gpu("B200", 2250, 8000, 178.4, 900),
        _gpu("H200", 989, 4800, 139.8, 450),
        _gpu("H100", 989, 3350, 79.2, 450),
        _gpu("H800", 989, 3350, 79.2, 200),
        _gpu("H20", 148, 4000, 95.6, 450),
        _gpu("A100", 312, 2039, 79.2, 300),
        _gpu("A100-40G", 312, 1555, 39.5, 300),
        _gpu("A800", 312, 2039, 79.2, 200),
        _gpu("L40S", 362, 864, 44.4),
        _gpu("L4", 121, 300, 22.0),
        _gpu("A10G", 70, 600, 22.1),
        # Consumer cards halve the rate of their tensor cores for sums in fp32.
        _gpu("RTX-4090", 165, 1008, 23.5),
        _gpu("RTX-3090", 71, 936, 23.6),
    )
}
# A core with AVX-512 or AVX2, and the memory channels of an ordinary server.
_CPU_CORE_TFLOPS, _CPU_BANDWIDTH = 0.05, 40.0
NAMES = ("cpu", *_GPUS)


def find_device(wanted: str | None, configured: str) -> tuple[Device, str]:
    """Return the device to plan for, and why: `--device`, this machine's GPU, or the default for `model.device`.

    Raises PlanError for a name that is not in the table.
    """
    if wanted is not None:
        known = {_plain(name): name for name in NAMES}
        if _plain(wanted) not in known:
            raise PlanError(f"--device {wanted!r} is not in the table; choose one of {', '.join(NAMES)}")
        name = known[_plain(wanted)]
        return (_cpu() if name == "cpu" else _GPUS[name]), "--device"
    if configured != "cpu":
        for found, memory in _gpus_here():
            if (listed := listed_name(found)) is not None:
                return replace(_GPUS[listed], memory=memory), f"this machine has {found}"
        if configured == "cuda":
            return _GPUS["H200"], 'model.device = "cuda" and no GPU here; --device plans for another'
    return _cpu(), "no GPU here; --device H200 plans for one" if configured == "auto" else 'model.device = "cpu"'


def listed_name(found: str) -> str | None:
    """Return the name in the table of a GPU that calls itself `found`, None if the table lacks it."""
    names = sorted(_GPUS, key=len, reverse=True)
    return next((listed for listed in names if _plain(listed) in _plain(found)), None)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _gpus_here() -> list[tuple[str, int]]:
    """Return name and bytes of memory of this machine's NVIDIA GPUs; [] if there is none or nvidia-smi fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rpartition(",") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [(name.strip(), int(mib) * 2**20) for name, _, mib in rows if mib.strip().isdigit()]


def _cpu() -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        name="cpu", tflops=cores * _CPU_CORE_TFLOPS, bandwidth=_CPU_BANDWIDTH, memory=memory, link=_CPU_BANDWIDTH
    )
