"""A rank whose packed row does not fit into memory must not leave the others waiting for it in a collective.

While ranks compute a row they meet in collectives: FSDP2 gathers parameters and reduces gradients layer by layer,
sequence parallelism exchanges heads. Which they are, and in which order, does not depend on what the row holds. So a
rank whose row fails computes an anchor in its place, a row of one token: it skips the collectives that it has had in
this row, joins those that are left, and then all ranks learn that the update must start again. What the others receive
of an anchor means nothing, and nobody uses it: they discard the update too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from or1.core.errors import RowMemoryError
from or1.dist.oom_retry import free_memory, is_out_of_memory
from or1.dist.world import World

T = TypeVar("T")


@dataclass
class RowCollectives:
    """Where this rank is among the collectives of the present row.

    done          how many it has taken part in
    seen          how many the present try has come to; less than `done` while a stand-in catches up
    slice_tokens  in a stand-in, tokens of the row's slice that it stands in for: what the others exchange. Else 0
    """

    done: int = 0
    seen: int = 0
    slice_tokens: int = 0

    def begin(self) -> None:
        """A row begins."""
        self.done = self.seen = 0

    def due(self) -> bool:
        """Whether the collective that comes now is still to be had. Ask right before each, with nothing in between."""
        self.seen += 1
        if self.seen <= self.done:
            return False
        self.done = self.seen
        return True

    @contextmanager
    def stand_in(self, slice_tokens: int) -> Iterator[None]:
        """The row from its start again, for a row of whose slice this rank had `slice_tokens` tokens."""
        self.seen, self.slice_tokens = 0, slice_tokens
        try:
            yield
        finally:
            self.slice_tokens = 0


# Of torch 2.13: FSDP2 can be brought back to rest after an exception in forward or backward.
CAN_STAND_IN = hasattr(FSDPModule, "reset_iter_state")
# One a process, since a process trains one row at a time.
ROW = RowCollectives()


def row_on_all_ranks(
    model: nn.Module, world: World, slice_tokens: int, work: Callable[[], T], anchor: Callable[[], object]
) -> T:
    """`work()`, the forward (and backward) of one row on this rank, while the other ranks compute theirs. Collective.

    slice_tokens  tokens of this rank's slice of the row
    anchor        the same on a row of one token; called only if `work` runs out of memory while others go on

    Raises RowMemoryError if memory ran out on any rank: on all of them, but for a rank that cannot stand in either.
    Errors of other kinds are left to the watchdog.
    """
    reason = ""
    if CAN_STAND_IN and isinstance(model, FSDPModule):
        # FSDP2 keeps the parameters of the root after a forward without gradients, and prefetches by former forwards;
        # the collectives of a row must not depend on either.
        model.reset_iter_state()
    ROW.begin()
    try:
        result = work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0]
    # Out of the handler: the exception's frames hold the very activations that have to go.
    if reason and world.size == 1 and isinstance(model, FSDPModule):
        raise RowMemoryError(reason, here_only=True)
    if reason and world.size > 1:
        reason = f"rank {world.rank}: {reason}"
        free_memory()
        _stand_in(model, slice_tokens, anchor, reason)
    if world.any(bool(reason)):
        raise RowMemoryError("; ".join(text.decode() for text in world.gather(reason.encode()) if text))
    return result


def _stand_in(model: nn.Module, slice_tokens: int, anchor: Callable[[], object], reason: str) -> None:
    if not CAN_STAND_IN:
        raise RowMemoryError(f"{reason}; FSDP2 cannot be reset after it before torch 2.13", here_only=True)
    model.reset_iter_state()
    try:
        with ROW.stand_in(slice_tokens):
            anchor()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RowMemoryError(f"{reason}; a row of one token does not fit either", here_only=True) from error


class _InPlaceOfDefault:
    """What FSDP2 asks of a custom collective beside the call: its buffers, made as FSDP2 makes them."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_InPlaceOfDefault):
    """FSDP2's gather of parameters; a stand-in that has had it computes with zeros."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if ROW.due():
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        output_tensor.zero_()
        return None


class _ReduceScatter(_InPlaceOfDefault):
    """FSDP2's sum of gradients; a stand-in that has had it gets its own, for nobody to use."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        if ROW.due():
            return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        output_tensor.zero_()
        return None


def count_collectives(module: FSDPModule) -> None:
    """Let the collectives of a sharded module pass through ROW, where this torch can reset FSDP2 after an error."""
    if CAN_STAND_IN:
        module.set_custom_all_gather(_AllGather())
        module.set_custom_reduce_scatter(_ReduceScatter())
