"""Writing of a model's weights to one safetensors file, a tensor at a time, and the room that the file needs.

safetensors' own `save_file` wants all tensors in host memory at once, so that a push would hold the weights three
times. Here the file itself is the only copy in host memory.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from or1.core.errors import EngineError
from or1.core.files import NO_ROOM, without_links
from or1.model.export import named_weights, weight_forms
from or1.model.host_copies import Lane, Mark, host_buffer

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def free_bytes(folder: Path) -> int:
    """Return the bytes that a user may still write to the file system of a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def file_bytes(model: PreTrainedModel) -> int:
    """Return the size of the file of a model's weights. Not collective."""
    return _Layout.of(model).size


def write_weights(path: Path, model: PreTrainedModel) -> None:
    """Write the model's current weights to a new file. Collective if the model is sharded.

    From a GPU, a weight is copied to host memory while the one before is written.

    Raises EngineError if the file does not fit. This rank then still takes part in gathering every weight.
    """
    layout = _Layout.of(model)
    broken: OSError | None = None
    with open(path, "wb", opener=without_links) as file:
        writer = _Writer(file.fileno(), layout)
        try:
            _write(file.fileno(), memoryview(layout.header), 0)
        except OSError as error:
            broken = error
        for name, tensor in named_weights(model):
            if broken is None:
                try:
                    writer.put(name, tensor)
                except OSError as error:
                    broken = error
        if broken is None:
            try:
                writer.finish()
            except OSError as error:
                broken = error
    if broken is None:
        return
    if broken.errno in NO_ROOM:
        raise no_room(path.parent, layout.size) from broken
    raise broken


def no_room(folder: Path, needed: int) -> EngineError:
    """Return the error for weights that do not fit into a folder."""
    return EngineError(
        f"the weights take {_mib(needed)}, and {folder} has room for {_mib(free_bytes(folder))}; make room there "
        "(for /dev/shm in a container: docker run --shm-size), or point TMPDIR or run_dir at a larger disk"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


@dataclass(frozen=True)
class _Layout:
    """The header of the file, where each tensor begins in it, and the bytes of the largest tensor."""

    header: bytes
    begins: dict[str, int]
    size: int
    largest: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Layout:
        forms = weight_forms(model)
        entries: dict[str, dict[str, object]] = {}
        end = largest = 0
        # The wide types first: the format allows no gaps, and a reader maps every tensor at a multiple of its type.
        for name, dtype, shape in sorted(forms, key=lambda form: -form[1].itemsize):
            if dtype not in _TYPES:
                raise EngineError(
                    f"{name} is {dtype}, a type that or1 does not push; convert the checkpoint to bfloat16"
                )
            size = math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end, largest = end + size, max(largest, size)
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        begins = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}  # type: ignore[index]
        return cls(header, begins, len(header) + end, largest)


class _Writer:
    """Writes tensors to their places in an open file; those of a GPU through two page-locked buffers in turn."""

    def __init__(self, file: int, layout: _Layout, lane: Lane | None = None):
        self._file, self._layout, self._lane = file, layout, lane
        self._buffers: list[Tensor] = []
        self._turn = 0
        self._arriving: tuple[str, Tensor, Mark] | None = None

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or start its copy to host memory and write the one before."""
        if self._lane is None and tensor.is_cuda:
            self._lane = Lane(tensor.device)
        if self._lane is None:
            self._write(name, tensor.contiguous())
            return
        if not self._buffers:
            pin = self._lane.device.type == "cuda"
            self._buffers = [host_buffer(self._layout.largest, torch.uint8, pin) for _ in range(2)]
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        copy = self._buffers[self._turn % 2][: flat.numel()]
        arriving = name, copy, self._lane.copy(copy, flat)
        self.finish()
        self._arriving, self._turn = arriving, self._turn + 1

    def finish(self) -> None:
        """Write the tensor that is on its way."""
        if self._arriving is not None and self._lane is not None:
            name, copy, mark = self._arriving
            self._arriving = None
            self._lane.finish(mark)
            self._write(name, copy)

    def _write(self, name: str, tensor: Tensor) -> None:
        # As bytes: numpy has no bfloat16.
        content = tensor.reshape(-1).view(torch.uint8).numpy()
        _write(self._file, content.data, self._layout.begins[name])


def _write(file: int, content: memoryview, at: int) -> None:
    # The kernel writes at most 2 GiB in one call.
    while content:
        count = os.pwrite(file, content, at)
        content, at = content[count:], at + count
