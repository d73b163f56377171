"""A machine with one fake H100: torch.cuda answers, Triton kernels are counted, reads by the host are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from benchmarks.gpu.fake import engine
from or1.model import attention_calls

_BYTES = 80 << 30
_PROPERTIES = SimpleNamespace(
    name="fake NVIDIA H100 80GB HBM3",
    total_memory=_BYTES,
    multi_processor_count=132,
    major=9,
    minor=0,
    L2_cache_size=50 << 20,
    shared_memory_per_multiprocessor=233472,
    uuid="GPU-fake",
)


@dataclass
class Log:
    """What ran: Triton launches as (kernel, grid, devices), and places where the host read a device value."""

    launches: list[tuple[str, tuple, set[str]]] = field(default_factory=list)
    host_reads: list[str] = field(default_factory=list)
    # Dtype and strides of the matrices that kernels were given.
    matrices: set[str] = field(default_factory=set)


class _Stream:
    """A stream or event on which nothing waits."""

    device = torch.device("cuda", 0)
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        """Do nothing."""

    wait_event = wait = record = synchronize = wait_stream

    def record_event(self, *_: Any) -> _Stream:
        """Return an event."""
        return self

    def query(self) -> bool:
        """Return True: everything is done."""
        return True

    def elapsed_time(self, _: Any) -> float:
        """Return a millisecond; nothing is timed on a fake machine."""
        return 1.0


class _Mode(fake_tensor.FakeTensorMode):
    """A mode that never starts the driver. torch would, since torch.cuda.is_available is True in the block."""

    avoid_device_init = True  # type: ignore[assignment]


@contextlib.contextmanager
def machine() -> Iterator[Log]:
    """Run the block on fake CUDA tensors. Raises RuntimeError where this torch cannot make them."""
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is a CPU build, which has no CUDA tensors, not even fake ones")
    log, mode = Log(), _Mode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(engine.installed())
        for target, name, value in (*_cuda(), *_tensors(log), *_triton(log)):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        yield log


def _cuda() -> Iterator[tuple[Any, str, Any]]:
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": _PROPERTIES.name,
        "get_device_capability": (9, 0),
        "get_device_properties": _PROPERTIES,
        "mem_get_info": (_BYTES, _BYTES),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "empty_cache": None,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
    }
    for name, answer in answers.items():
        yield torch.cuda, name, lambda *_, _answer=answer, **__: _answer
    # FakeTensor asks is_available too, and would start the driver.
    yield fake_tensor, "init_gpu_context", lambda *_: None
    for name in ("Stream", "Event"):
        yield torch.cuda, name, _Stream
    for name in ("current_stream", "default_stream"):
        yield torch.cuda, name, lambda *_, **__: _Stream()
    for name in ("stream", "device", "device_of"):
        yield torch.cuda, name, lambda *_, **__: contextlib.nullcontext()
    registration = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    yield torch.cuda, "cudart", lambda: registration
    # The choice among SDPA's kernels asks the driver.
    yield attention_calls, "scaled_dot_product_attention", _attention


def _attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
    """Return what SDPA returns, by its equation; a mask would change no shape."""
    heads = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(heads, dim=-3) for x in (k, v))
    return torch.softmax(q @ k.mT * (scale or q.shape[-1] ** -0.5), dim=-1) @ v


def _tensors(log: Log) -> Iterator[tuple[Any, str, Any]]:
    def read(name: str, value: Any) -> Any:
        real = getattr(Tensor, name)

        def method(tensor: Tensor, *_: Any) -> Any:
            known = getattr(tensor, "constant", None)
            if tensor.is_cuda:
                log.host_reads.append(_caller())
            elif known is not None or not isinstance(tensor, fake_tensor.FakeTensor):
                return real(tensor if known is None else known)
            return value

        return method

    for name, value in (("__bool__", True), ("__float__", 1.0), ("__int__", 1), ("item", 1.0)):
        yield torch.Tensor, name, read(name, value)
    yield torch.nn.Module, "to", _to
    yield torch.Tensor, "pin_memory", lambda tensor, *_: tensor.clone()
    yield torch.Tensor, "is_pinned", lambda tensor, *_: tensor.device.type == "cpu"
    yield torch.Tensor, "record_stream", lambda *_: None
    yield torch, "addmm", _addmm(torch.addmm)
    # Only a driver has generators on the device. The draws are fake anyway.
    generator = torch.Generator
    yield torch, "Generator", lambda *_, **__: generator()
    yield torch, "_assert_async", lambda *_: None


def _to(module: torch.nn.Module, *args: Any, **named: Any) -> torch.nn.Module:
    """Move the buffers of a module whose parameters are there already: torch cannot exchange fake parameters."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **named)
    if (away := {p.device for p in module.parameters() if device and p.device.type != device.type}) or dtype:
        raise RuntimeError(f"parameters on {away} cannot move to {device}, {dtype} here; make them there")
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
    return module


def _addmm(real: Any) -> Any:
    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, out_dtype: Any = None, out: Any = None, **more: Any) -> Tensor:
        if out_dtype is None:
            return real(bias, a, b, out=out, **more)
        # torch's fake implementation takes out_dtype for beta. This holds the real one's rules instead.
        shape = (a.shape[0], b.shape[1])
        if a.shape[1] != b.shape[0] or bias.shape != shape or out is None or out.shape != shape:
            raise RuntimeError(f"addmm: shapes {bias.shape}, {a.shape}, {b.shape}")
        if a.dtype != b.dtype or bias.dtype not in (out_dtype, a.dtype) or out.dtype != out_dtype:
            raise RuntimeError(f"addmm: dtypes {bias.dtype}, {a.dtype}, {b.dtype} -> {out.dtype}, {out_dtype}")
        if {x.device for x in (bias, b, out)} != {a.device}:
            raise RuntimeError("addmm: tensors on several devices")
        return out

    return addmm


def _triton(log: Log) -> Iterator[tuple[Any, str, Any]]:
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return

    def run(kernel: Any, *positional: Any, grid: Any, **named: Any) -> None:
        tensors = [x for x in (*positional, *named.values()) if isinstance(x, Tensor)]
        log.matrices |= {f"{str(t.dtype)[6:]} {tuple(t.stride())}" for t in tensors if t.ndim == 2}
        sizes = tuple(grid) if isinstance(grid, list | tuple) else ()
        log.launches.append((kernel.fn.__name__, sizes, {t.device.type for t in tensors}))

    yield JITFunction, "run", run


def _caller() -> str:
    """Return file:line of the code of this repository that read a value, else of the nearest caller."""
    import traceback

    frames = [f for f in traceback.extract_stack()[:-2] if "/gpu/fake/" not in f.filename]
    own = [f for f in frames if "/or1" in f.filename and "site-packages" not in f.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
