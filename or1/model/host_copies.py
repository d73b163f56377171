"""Copies between a device and host memory beside the computation, and saved tensors that wait in host memory.

A copy runs beside kernels only if the host memory is page-locked, the call is non-blocking, and both sides have one
dtype. Without the first, CUDA copies through a buffer of its own and the host waits. With a change of dtype, torch
converts on the CPU into pageable memory.

On a CPU the same calls copy at once, so that the order of the calls can be tested without a GPU.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

Mark = Any
"""The end of a copy on a lane: a CUDA event; None on a CPU."""

# Offloading a smaller tensor costs more time than its memory is worth.
_MIN_OFFLOAD_BYTES = 1 << 20


class Lane:
    """A stream for copies between one device and host memory, in the order of the calls."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor) -> Mark:
        """Copy `source` to `target` after all work queued on the device so far; return a mark of the end.

        Raises ValueError for two dtypes: such a copy would not run beside the computation.
        """
        if target.dtype != source.dtype:
            raise ValueError(f"a copy from {source.dtype} to {target.dtype} blocks; convert on the device first")
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        for tensor in (target, source):
            if tensor.is_cuda:
                # Keeps the allocator from giving the memory away while the copy still uses it.
                tensor.record_stream(self._stream)
        return self._stream.record_event()

    def join(self, mark: Mark) -> None:
        """Make work that the device gets from now on wait for a copy."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self, mark: Mark) -> None:
        """Make the host wait for a copy."""
        if mark is not None:
            mark.synchronize()


def host_buffer(numel: int, dtype: torch.dtype, pin: bool) -> Tensor:
    """Return an uninitialised tensor of exactly `numel` values in host memory, page-locked if `pin`.

    torch's own allocator of pinned memory rounds every size up to a power of two and keeps freed blocks: 2.2 GB of an
    embedding take 4.3. So the memory is allocated as usual and then registered with the driver.
    """
    buffer = torch.empty(numel, dtype=dtype)
    if not pin or not numel:
        return buffer
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    if int(runtime.cudaHostRegister(address, buffer.nbytes, 0)):
        # Refused where the limit on locked memory is low (ulimit -l). torch's allocator then says why.
        return torch.empty(numel, dtype=dtype, pin_memory=True)
    # The storage outlives every view. Memory that is freed while registered would stay locked.
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address).atexit = False
    return buffer


class HostPool:
    """Page-locked buffers that are used again. Locking memory takes longer than a copy into it."""

    def __init__(self, pin: bool):
        self._pin = pin
        self._free: list[Tensor] = []

    @property
    def free_bytes(self) -> int:
        """Bytes of the buffers that nobody uses."""
        return sum(buffer.nbytes for buffer in self._free)

    def take(self, nbytes: int) -> Tensor:
        """Return uint8[at least nbytes]: the smallest free buffer that is large enough, else a new one."""
        fitting = [i for i, buffer in enumerate(self._free) if buffer.nbytes >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
        if self._free:
            # Rows grow and shrink. A buffer too small for this row gives way, so that the pool does not keep growing.
            del self._free[max(range(len(self._free)), key=lambda i: self._free[i].nbytes)]
        return host_buffer(nbytes, torch.uint8, self._pin)

    def give(self, buffer: Tensor) -> None:
        """Take back a buffer. Copies of one lane may still use the buffer; those of another may not."""
        self._free.append(buffer)


class _Kept:
    """A saved tensor in host memory, the one that was saved before, and the copy on the device once started."""

    def __init__(self, tensor: Tensor, buffer: Tensor, before: weakref.ref[_Kept] | None):
        self.device = tensor.device
        self.host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.before = before
        self.fetched: tuple[Tensor, Mark] | None = None


class Shelf:
    """Saved tensors of autograd in host memory: hooks for `torch.autograd.graph.saved_tensors_hooks`.

    Backward takes the tensors in the reverse order. So each `take` starts the copy of the tensor that was put before:
    it runs while the device computes the backward of the layer between them.
    """

    def __init__(self, device: torch.device, least_bytes: int = _MIN_OFFLOAD_BYTES, lane: Lane | None = None):
        self.device, self._least = device, least_bytes
        self.lane = Lane(device) if lane is None else lane
        self.pool = HostPool(pin=device.type == "cuda")
        self._last: weakref.ref[_Kept] | None = None

    def put(self, tensor: Tensor) -> Tensor | _Kept:
        """Start the copy to host memory and return what `take` needs; a small or foreign tensor as it is."""
        if tensor.device.type != self.device.type or tensor.nbytes < self._least:
            return tensor
        buffer = self.pool.take(tensor.nbytes)
        kept = _Kept(tensor, buffer, self._last)
        self.lane.copy(kept.host, tensor.detach())
        # With the graph the tensor goes, taken or not. All copies run on one lane, so the next use comes after them.
        weakref.finalize(kept, self.pool.give, buffer).atexit = False
        self._last = weakref.ref(kept)
        return kept

    def take(self, packed: Tensor | _Kept) -> Tensor:
        """Return the tensor on its device, and start the copy of the one before."""
        if isinstance(packed, Tensor):
            return packed
        tensor, mark = packed.fetched or self._fetch(packed)
        packed.fetched = None
        self.lane.join(mark)
        # Dead if that tensor was of an earlier row, whose graph is gone.
        before = packed.before() if packed.before is not None else None
        if before is not None and before.fetched is None:
            before.fetched = self._fetch(before)
        return tensor

    def _fetch(self, kept: _Kept) -> tuple[Tensor, Mark]:
        tensor = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
        return tensor, self.lane.copy(tensor, kept.host)


@functools.cache
def shelf_of(device: torch.device) -> Shelf:
    """Return the process's shelf of a device."""
    return Shelf(device)
