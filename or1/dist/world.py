"""The ranks of a run: who they are, and the few things they must decide together.

Every choice that steers a collective has to come out the same on all ranks, or some wait for ever for the others. Such
choices go through `World.all_agree` and `World.any`, which name what they do where they are made.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from or1.config import DistConfig
from or1.core.errors import DistError


@dataclass(frozen=True)
class World:
    """The ranks of a run as a mesh [data, sequence]; a single process is a world of size 1 without a mesh.

    Ranks of one sequence group are neighbours (rank = data_rank * sequence_size + sequence_rank): they exchange
    activations in every layer and should share a node.
    """

    rank: int = 0
    size: int = 1
    sequence_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what a run writes once: metrics, rollouts, manifests, the display."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of an update's packed rows this rank trains."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """Shares of an update."""
        return self.size // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """Which part of each packed row this rank holds."""
        return self.rank % self.sequence_size

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's packed rows; None without sequence parallelism."""
        return self.mesh["sequence"].get_group() if self.mesh is not None and self.sequence_size > 1 else None

    @property
    def shard_mesh(self) -> DeviceMesh:
        """All ranks as one dimension: parameters are sharded over data and sequence alike."""
        if self.mesh is None:
            raise DistError("a single process has no mesh; start several with `or1 train --nproc N`")
        return self.mesh["data", "sequence"]._flatten("shard")

    def share(self, count: int) -> range:
        """Which of `count` independent pieces of work this rank does: every size-th, from its rank on."""
        return range(self.rank, count, self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks, on the host."""
        total = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all ranks, on the host."""
        largest = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def all_agree(self, flag: bool) -> bool:
        """Whether the flag is true on every rank."""
        return self.sum(torch.tensor(int(flag))).item() == self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on some rank."""
        return self.sum(torch.tensor(int(flag))).item() > 0

    def gather(self, payload: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order, on every rank."""
        if self.size == 1:
            return [payload]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(payload)]))
        width = max(int(n) for n in lengths)
        mine = torch.zeros(width, dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload) or bytearray(1), dtype=torch.uint8)[: len(payload)]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return [row[: int(n)].numpy().tobytes() for row, n in zip(rows, lengths, strict=True)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)


SINGLE = World()


def launched_ranks() -> int:
    """Ranks that torchrun (or `or1 train --nproc`) started this process as one of; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join(config: DistConfig, device: torch.device) -> Iterator[World]:
    """The world of this process, by torchrun's environment; leaves it at the end.

    Control data travels over gloo on the host, tensors of a GPU model over NCCL.

    Raises DistError if `dist.sequence_parallel` does not divide the number of ranks.
    """
    size = launched_ranks()
    if size % config.sequence_parallel:
        raise DistError(
            f"dist.sequence_parallel = {config.sequence_parallel} does not divide the {size} ranks; start a multiple "
            "of it (or1 train --nproc N), or lower it"
        )
    if size == 1:
        yield SINGLE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=config.timeout_s)
    )
    try:
        yield world_of(device.type, config.sequence_parallel)
    finally:
        dist.destroy_process_group()


def world_of(device_type: str, sequence_size: int) -> World:
    """The mesh over the ranks of the initialised process group. Collective."""
    size = dist.get_world_size()
    mesh = init_device_mesh(device_type, (size // sequence_size, sequence_size), mesh_dim_names=("data", "sequence"))
    return World(dist.get_rank(), size, sequence_size, mesh)


def open_store(address: str) -> dist.TCPStore:
    """Return a key-value store that listens on this one address, at a free port.

    Whoever reaches the port of a store may read and change all that is in it: a store asks for no password.
    """
    # Without a socket of our own, TCPStore listens on every interface, whatever address the caller names.
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def split_evenly(count: int, parts: int) -> Sequence[range]:
    """Consecutive ranges as torch.chunk makes them, which is how FSDP2 shards dimension 0; late ones may be empty."""
    width = -(-count // parts) if count else 0
    return [range(min(i * width, count), min((i + 1) * width, count)) for i in range(parts)]
