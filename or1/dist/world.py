"""The ranks of a run, and the decisions they make together.

A decision that affects collectives must have the same result on all ranks, or the run deadlocks. Such decisions use
`World.all_agree` and `World.any`.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from or1.config import DistConfig
from or1.core.errors import DistError
from or1.dist.board import Board


@dataclass(frozen=True)
class World:
    """Ranks of a run as a mesh [data, sequence]. A single process is a world of size 1 without a mesh.

    Each of `replicas` groups of neighbouring ranks holds one copy of the model, sharded over the group (HSDP).
    Groups and rows are independent: `grid` is the same ranks as a mesh [replica, shard], None for one group.

    Ranks of one sequence group are adjacent: rank = data_rank * sequence_size + sequence_rank. They exchange
    activations in every layer and should share a node.

    board  counters and meetings of the ranks; None in a single process, and where no run has been joined
    """

    rank: int = 0
    size: int = 1
    sequence_size: int = 1
    mesh: DeviceMesh | None = None
    replicas: int = 1
    grid: DeviceMesh | None = None
    board: Board | None = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes metrics, rollouts, manifests and the display."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Index of this rank's share of an update's packed rows."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """Number of shares of an update's packed rows."""
        return self.size // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """Index of this rank's slice of each packed row."""
        return self.rank % self.sequence_size

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """Process group of the ranks that share this rank's packed rows; None without sequence parallelism."""
        return self.mesh["sequence"].get_group() if self.mesh is not None and self.sequence_size > 1 else None

    @property
    def shard_mesh(self) -> DeviceMesh:
        """One-dimensional mesh over the ranks that hold this rank's copy of the model, of data and sequence alike."""
        if self.mesh is None:
            raise DistError("a single process has no mesh; start several with `or1 train --nproc N`")
        return self.mesh["data", "sequence"]._flatten("shard") if self.grid is None else self.grid["shard"]

    @property
    def shard_size(self) -> int:
        """Number of ranks that hold one copy of the model together."""
        return self.size // self.replicas

    @property
    def shard_rank(self) -> int:
        """Index of this rank's part of each sharded tensor."""
        return self.rank % self.shard_size

    @property
    def in_first_replica(self) -> bool:
        """True on the ranks whose copy of the model counts where one copy is enough: checkpoints, norms."""
        return self.rank < self.shard_size

    def sum_replicas(self, values: Tensor) -> None:
        """Add up, in place, the values that the ranks of the same shard hold, one rank of each group. Collective."""
        if self.grid is not None:
            dist.all_reduce(values, group=self.grid["replica"].get_group())

    def share(self, count: int) -> range:
        """Return this rank's share of `count` independent pieces of work: every size-th, starting at its rank."""
        return range(self.rank, count, self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all ranks, on the CPU. Collective."""
        total = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def max(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over all ranks, on the CPU. Collective."""
        largest = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def all_agree(self, flag: bool) -> bool:
        """Return True if the flag is true on every rank. Collective."""
        return self.sum(torch.tensor(int(flag))).item() == self.size

    def any(self, flag: bool) -> bool:
        """Return True if the flag is true on at least one rank. Collective."""
        return self.sum(torch.tensor(int(flag))).item() > 0

    def gather(self, payload: bytes) -> list[bytes]:
        """Return the bytes of every rank in rank order, on every rank. Collective."""
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

    def from_main(self, payload: bytes) -> bytes:
        """Return the main rank's bytes on every rank; those of the other ranks are ignored. Collective."""
        return self.gather(payload if self.is_main else b"")[0]

    def meet(self) -> None:
        """Wait until every rank has called this method, without a time limit for a rank that works. Collective.

        Raises RankSilent. Call before the collective that ends work of different length, such as a rollout.
        """
        if self.board is not None:
            self.board.meet()

    def barrier(self) -> None:
        """Wait until every rank has called this method. Collective."""
        self.any(False)


SINGLE = World()
_SPLITS = "VLLM_DISTRIBUTED_USE_SPLIT_GROUP"


def launched_ranks() -> int:
    """Return the number of ranks that torchrun or `or1 train --nproc` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join(config: DistConfig, device: torch.device) -> Iterator[World]:
    """Yield the world that torchrun's environment variables describe, and leave the process group at the end.

    Control data uses gloo on the host; tensors of a GPU model use NCCL. Raises DistError if `dist.sequence_parallel`
    or `dist.shard_ranks` does not divide the number of ranks.
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
    if size % (config.shard_ranks or 1):
        raise DistError(
            f"dist.shard_ranks = {config.shard_ranks} does not divide the {size} ranks; start a multiple of it, set it "
            "to a divisor such as the GPUs of a node, or remove it, and all ranks share one copy"
        )
    bound: torch.device | None = None
    if device.type == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
        # With a bound device torch splits communicators for every new group, and every rank must take part in a split.
        # vLLM asks for it by this variable. Without it, groups of some ranks only stay possible.
        bound = own if os.environ.get(_SPLITS) == "1" else None
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=config.timeout_s),
        device_id=bound,
    )
    try:
        yield world_of(device.type, config.sequence_parallel, config.timeout_s, config.shard_ranks)
    finally:
        dist.destroy_process_group()


def world_of(device_type: str, sequence_size: int, timeout_s: float, shard_ranks: int | None = None) -> World:
    """Return the world over the ranks of the initialised process group. Collective.

    timeout_s    longest silence of a rank that others wait for in `World.meet`
    shard_ranks  ranks that hold one copy of the model; None: all
    """
    size = dist.get_world_size()
    mesh = init_device_mesh(device_type, (size // sequence_size, sequence_size), mesh_dim_names=("data", "sequence"))
    replicas = size // (shard_ranks or size)
    grid = None
    if replicas > 1:
        grid = init_device_mesh(device_type, (replicas, size // replicas), mesh_dim_names=("replica", "shard"))
    world = World(dist.get_rank(), size, sequence_size, mesh, replicas, grid)
    # The store of torchrun's agent outlives a restart of the ranks, so every start has keys of its own.
    session = world.from_main(secrets.token_hex(8).encode()).decode()
    return replace(world, board=Board.open(world.rank, size, session=session, timeout_s=timeout_s))


def open_store(address: str) -> dist.TCPStore:
    """Return a key-value store that listens only on the given address, at a free port.

    A store has no password: every process that reaches its port can read and change its content.
    """
    # Without a socket from the caller, TCPStore listens on every interface, whatever its address argument.
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def split_evenly(count: int, parts: int) -> Sequence[range]:
    """Return consecutive ranges as torch.chunk and FSDP2 split dimension 0. The last ranges may be empty."""
    width = -(-count // parts) if count else 0
    return [range(min(i * width, count), min((i + 1) * width, count)) for i in range(parts)]
