"""The size of a packed row, halved when one does not fit into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from or1.core.errors import MemoryLimitError, RowMemoryError, ShorterRowsError

T = TypeVar("T")


@dataclass
class Budget:
    """`max_tokens` a packed row; `out_of_memory` counts the halvings; `tell` shows a person what happened.

    With several ranks every one has a budget, and all of them stay alike. `cap` is called with the budget that a
    resumed run should start with, if this one has to end.
    """

    max_tokens: int
    out_of_memory: int = 0
    tell: Callable[[str], None] = field(default=lambda message: None, repr=False)
    cap: Callable[[int], None] | None = field(default=None, repr=False)

    def state(self) -> dict[str, int]:
        """Plain data: a resumed run must pack as the first one did, or its sums would round otherwise."""
        return {"max_tokens": self.max_tokens, "out_of_memory": self.out_of_memory}

    def restore(self, state: dict[str, int]) -> None:
        """The inverse of `state`; of an empty one, nothing."""
        self.max_tokens = state.get("max_tokens", self.max_tokens)
        self.out_of_memory = state.get("out_of_memory", self.out_of_memory)

    def run(self, attempt: Callable[[int], T], longest: int) -> T:
        """`attempt(max_tokens)`, again with half the budget for as long as it runs out of memory.

        An attempt must leave nothing behind when it fails, and says with a RowMemoryError that it did. Never goes
        below `longest`, the tokens of the longest sequence: raises MemoryLimitError if that does not fit, and
        ShorterRowsError if the other ranks cannot be told to start again. The smaller budget stays for later calls.
        """
        while True:
            try:
                # A later update may have a longer sequence than the one for which the budget was lowered.
                return attempt(max(self.max_tokens, longest))
            except RowMemoryError as error:
                reason = str(error)
                if error.here_only:
                    raise self._give_up(longest, reason) from error
            # Out of the handler, so that the exception's frames are gone.
            self._halve(longest, reason)

    def _give_up(self, longest: int, reason: str) -> MemoryLimitError:
        smaller = max(longest, self.max_tokens // 2)
        resumes = self.cap is not None and smaller < self.max_tokens
        if resumes:
            self.cap(smaller)
        kind = ShorterRowsError if resumes else MemoryLimitError
        resume = f"The same command resumes with rows of {smaller}. If that is not enough, set" if resumes else "Set"
        return kind(
            f"out of memory with packed rows of {self.max_tokens} tokens, and the other ranks cannot be told in the "
            f'midst of one. {resume} dist.sequence_parallel = 2 or optim.optimizer = "offload" ({reason})'
        )

    def _halve(self, longest: int, reason: str) -> None:
        if self.max_tokens <= longest:
            raise MemoryLimitError(
                f"out of memory with a packed row of {self.max_tokens} tokens, and the longest sequence has {longest}: "
                'a row cannot be shorter. Set model.gradient_checkpointing = "offload", optim.optimizer = "adamw8bit" '
                f'or "offload", or lower the stage\'s max_response_tokens ({reason})'
            )
        before, self.max_tokens = self.max_tokens, max(longest, self.max_tokens // 2)
        self.out_of_memory += 1
        self.tell(
            f"out of memory with packed rows of {before} tokens; going on with {self.max_tokens}. The gradient is the "
            f"same. Set optim.max_tokens_per_rank = {self.max_tokens} to save the retry ({reason})"
        )
        free_memory()


def free_memory() -> None:
    """Give back what nothing refers to any more, the allocator's cache included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on the GPU or the CPU; torch has no type of its own for the latter."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


# Allocations that do not go through torch's own allocators.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
