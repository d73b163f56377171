"""Out of memory on one rank of several, without a deadlock of the others in a collective.

While ranks compute a row they call collectives: FSDP2 gathers parameters and reduces gradients layer by layer, sequence
parallelism exchanges heads. Their kinds and their order do not depend on the row. So a rank whose row runs out of
memory computes an anchor instead, a row of one token. The rank skips the collectives that it already completed for
this row and joins the remaining ones. Then all ranks agree to start the update again. Other ranks receive garbage from
an anchor row; they discard this update anyway.
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

R = TypeVar("R")
T = TypeVar("T")


@dataclass
class RowCollectives:
    """The position of this rank in the collectives of the current row.

    done          collectives that this rank completed for the row
    seen          collectives that the current pass over the row reached; an anchor first catches up with `done`
    slice_tokens  while an anchor is computed, tokens of the slice it replaces, which the others exchange; else 0
    """

    done: int = 0
    seen: int = 0
    slice_tokens: int = 0

    def begin(self) -> None:
        """Start a new row."""
        self.done = self.seen = 0

    def due(self) -> bool:
        """Return True if this rank must still take part in the next collective. Call immediately before each one."""
        self.seen += 1
        if self.seen <= self.done:
            return False
        self.done = self.seen
        return True

    @contextmanager
    def anchor(self, slice_tokens: int) -> Iterator[None]:
        """Pass over the row a second time, with an anchor in place of this rank's slice of `slice_tokens` tokens."""
        self.seen, self.slice_tokens = 0, slice_tokens
        try:
            yield
        finally:
            self.slice_tokens = 0


# New in torch 2.13: FSDP2 can be reset after an exception in forward or backward.
CAN_ANCHOR = hasattr(FSDPModule, "reset_iter_state")
# One for the process, which computes one row at a time.
ROW = RowCollectives()


def row_on_all_ranks(
    model: nn.Module, world: World, slice_tokens: int, work: Callable[[R], T], row: R, make_anchor: Callable[[], R]
) -> T:
    """Return `work(row)`, the forward (and backward) of this rank's row, while other ranks compute theirs. Collective.

    slice_tokens  tokens of this rank's slice of the row
    make_anchor   makes a row of one token, for `work` to compute if `work(row)` runs out of memory

    Raises RowMemoryError on all ranks if any rank runs out of memory. A rank that cannot compute an anchor either
    raises it alone. Other errors are left to the watchdog.
    """
    reason = ""
    if CAN_ANCHOR and isinstance(model, FSDPModule):
        # FSDP2 keeps the root's parameters after a forward without gradients, and prefetches by earlier forwards. The
        # collectives of a row must not depend on either.
        model.reset_iter_state()
    ROW.begin()
    try:
        result = work(row)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0]
    # Outside the handler: the exception's frames hold the activations that have to be freed.
    if reason and world.size == 1 and isinstance(model, FSDPModule):
        raise RowMemoryError(reason, here_only=True)
    if reason and world.size > 1:
        reason = f"rank {world.rank}: {reason}"
        free_memory()
        _compute_anchor(model, slice_tokens, work, make_anchor, reason)
    if world.any(bool(reason)):
        raise RowMemoryError("; ".join(text.decode() for text in world.gather(reason.encode()) if text))
    return result


def _compute_anchor(
    model: nn.Module, slice_tokens: int, work: Callable[[R], object], make_anchor: Callable[[], R], reason: str
) -> None:
    if not CAN_ANCHOR or not isinstance(model, FSDPModule):
        raise RowMemoryError(f"{reason}; FSDP2 cannot be reset after it before torch 2.13", here_only=True)
    model.reset_iter_state()
    try:
        with ROW.anchor(slice_tokens):
            work(make_anchor())
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RowMemoryError(f"{reason}; a row of one token does not fit either", here_only=True) from error


class _InPlaceOfDefault:
    """Base of a custom collective of FSDP2: it allocates buffers as FSDP2 does."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_InPlaceOfDefault):
    """FSDP2's gather of parameters. An anchor that already completed it computes with zeros."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if ROW.due():
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        output_tensor.zero_()
        return None


class _ReduceScatter(_InPlaceOfDefault):
    """FSDP2's sum of gradients. An anchor that already completed it gets zeros, which nobody uses."""

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
    """Count the collectives of a sharded module in ROW, if this torch can reset FSDP2 after an error."""
    if CAN_ANCHOR:
        # torch checks these by structure, and its abstract classes differ between versions.
        module.set_custom_all_gather(_AllGather())  # type: ignore[arg-type]
        module.set_custom_reduce_scatter(_ReduceScatter())  # type: ignore[arg-type]
