"""The sum of what a GPU must hold for the trainer and vLLM together, checked before vLLM takes its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from or1.config import Config
from or1.core.errors import EngineError, OptimizerError
from or1.dist.oom_retry import free_memory
from or1.rollout.make import engine_kind
from or1.train.masters import MasterWeights

_GIB = 2**30
_REMEDIES = {
    "masters": 'optim.weights = "stochastic" keeps none',
    "moments": 'optim.optimizer = "adamw8bit" has a quarter, "offload" moves masters and moments to host memory',
    "gradients": 'optim.grad_dtype = "bfloat16" halves them if they are fp32',
    "reference model": "loss.kl_coef = 0 needs none",
    "CUDA and other processes": "end other programs on this GPU",
}


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a GPU: all, and those that this process cannot have (the driver's, and other programs')."""

    total: int
    foreign: int

    @classmethod
    def of(cls, device: torch.device) -> GpuMemory:
        """Return the present state of a GPU."""
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, max(0, total - free - torch.cuda.memory_reserved(device)))


def require_room(
    config: Config,
    model: nn.Module,
    optimizer: MasterWeights,
    reference: nn.Module | None,
    gpu: GpuMemory | None = None,
) -> None:
    """Raise EngineError with the numbers if the trainer and vLLM do not fit on a GPU that they share.

    Call this once the moments exist. vLLM reserves `rollout.vllm.gpu_memory` of the GPU at its start, and what the
    trainer allocates later would fail in the middle of a step.

    gpu  None: the model's GPU; on a CPU there is nothing to check
    """
    device = next(model.parameters()).device
    if gpu is None:
        if device.type != "cuda" or not _shares_gpu(config, device):
            return
        # vLLM counts as taken what this process has freed but keeps for itself.
        free_memory()
        gpu = GpuMemory.of(device)
    held = optimizer.resident_bytes() | {"weights": _bytes_of(model), "CUDA and other processes": gpu.foreign}
    if reference is not None:
        held["reference model"] = _bytes_of(reference)
    gradients = held.pop("gradients")
    # A colocated engine sleeps while gradients exist, except with overlap. A server never sleeps.
    sleeps = config.rollout.vllm.placement == "colocate" and not config.rollout.steps_ahead
    _require(held | {"gradients": gradients}, "backward", gpu, None if sleeps else config.rollout.vllm.gpu_memory)
    _require(held, "generation", gpu, config.rollout.vllm.gpu_memory)


def _shares_gpu(config: Config, device: torch.device) -> bool:
    vllm = config.rollout.vllm
    elsewhere = vllm.placement == "server" and (vllm.devices is not None or vllm.url is not None)
    return engine_kind(config, device) == "vllm" and not elsewhere


def _bytes_of(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)


def _require(held: dict[str, int], when: str, gpu: GpuMemory, share: float | None) -> None:
    parts = held if share is None else held | {"vLLM": int(share * gpu.total)}
    needed = sum(parts.values())
    if needed <= gpu.total:
        return
    listed = " + ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items() if size)
    remedies = [f"{name}: {_REMEDIES[name]}" for name, size in parts.items() if size and name in _REMEDIES]
    if share is not None:
        left = int(100 * (gpu.total - sum(held.values())) / gpu.total) / 100
        # Below the bytes of its own weights vLLM does not start.
        enough = left * gpu.total > held["weights"]
        remedies.insert(
            0,
            f"vLLM: rollout.vllm.gpu_memory = {left:g} would fit, now {share:g}"
            if enough
            else 'vLLM: rollout.vllm.placement = "server" on other devices',
        )
    raise EngineError(
        f"the GPU has {gpu.total / _GIB:.1f} GiB, and {when} needs {needed / _GIB:.1f}: {listed}. Lower one of them "
        f"({'; '.join(remedies)}), or use more GPUs"
    )


@contextmanager
def states_fit(device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error of the block, which makes the optimizer's state, into an OptimizerError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
        raise OptimizerError(
            f"masters and moments do not fit on the GPU of {total / _GIB:.1f} GiB; set optim.optimizer = "
            f'"adamw8bit" or "offload", or optim.weights = "stochastic", or use more GPUs ({error})'
        ) from error
