"""Memory that two processes of one machine map: of a GPU by CUDA's IPC handles, of the host by shared memory.

A handle is plain data for JSON. Nothing is unpickled, since a pickle from the network could run any code.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import torch
from torch import Tensor

from or1.core.allocator import ALLOCATOR_VARIABLES

PROBE = 16
"""Bytes of a buffer that tells whether another process can map memory, and the value of each."""
_HOST_NAME = b"/torch_"
"""How torch names shared memory; no other memory is opened."""


def shared_buffer(size: int, device: torch.device) -> Tensor:
    """Return memory that `handle_of` can share, u8[size]."""
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    # The memory of a growing segment can be shared only with processes that may trace this one.
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    finally:
        if any("expandable_segments:True" in os.environ.get(name, "") for name in ALLOCATOR_VARIABLES):
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def handle_of(buffer: Tensor) -> dict[str, Any]:
    """Return the handle of a `shared_buffer`. The buffer must live until every process has closed its own."""
    storage = buffer.untyped_storage()
    if buffer.device.type != "cuda":
        manager, name, size = storage._share_filename_cpu_()
        return {"kind": "host", "manager": _text(manager), "name": _text(name), "size": size}
    device, handle, size, offset, counter, counter_offset, event, waits = storage._share_cuda_()
    return {
        "kind": "cuda",
        "gpu": gpu_id(device),
        "handle": _text(handle),
        "size": size,
        "offset": offset,
        "counter": _text(counter),
        "counter_offset": counter_offset,
        "event": _text(event),
        "waits": waits,
    }


def open_handle(handle: dict[str, Any]) -> Tensor:
    """Return the buffer of another process, u8[size]. Raises ValueError if this process cannot see it."""
    if handle["kind"] == "host":
        name = _bytes(handle["name"])
        if not name.startswith(_HOST_NAME):
            raise ValueError(f"{name!r} is no memory that torch shares")
        storage = torch.UntypedStorage._new_shared_filename_cpu(_bytes(handle["manager"]), name, handle["size"])
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    known = [gpu_id(index) for index in range(torch.cuda.device_count())]
    if handle["gpu"] not in known:
        raise ValueError(f"GPU {handle['gpu']} is not visible here; visible are {', '.join(known) or 'none'}")
    torch.cuda._lazy_init()
    storage = torch.UntypedStorage._new_shared_cuda(
        known.index(handle["gpu"]),
        _bytes(handle["handle"]),
        handle["size"],
        handle["offset"],
        _bytes(handle["counter"]),
        handle["counter_offset"],
        _bytes(handle["event"]),
        handle["waits"],
    )
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def gpu_id(index: int) -> str:
    """Return the identity of a GPU, the same in every process."""
    return str(torch.cuda.get_device_properties(index).uuid)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
