"""Retry after out-of-memory: packed rows of half the tokens."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from or1.core.errors import MemoryLimitError, RowMemoryError, ShorterRowsError


class Attempt:
    """One try in rows of at most `max_tokens` tokens: a context manager that keeps the reason of a RowMemoryError.

    The exception itself is not kept: its frames hold the activations that have to be freed before the next attempt.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.failed, self.here_only, self.reason = False, False, ""

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, RowMemoryError):
            return False
        self.failed, self.here_only, self.reason = True, error.here_only, str(error)
        return True


def _silent(message: str) -> None:
    """Drop a message."""


@dataclass
class RowBudget:
    """The most tokens of a packed row, halved after each out-of-memory.

    max_tokens     tokens of a packed row
    out_of_memory  times that the budget was halved
    message        shows a person that rows became shorter
    cap            records the budget for the next start of a run that has to end; None where no run resumes

    Every rank has a budget of its own, and all of them stay equal.
    """

    max_tokens: int
    out_of_memory: int = 0
    message: Callable[[str], None] = field(default=_silent, repr=False)
    cap: Callable[[int], None] | None = field(default=None, repr=False)

    def state_dict(self) -> dict[str, int]:
        """Return plain data for a checkpoint: a resumed run must pack the same rows to round the same sums."""
        return {"max_tokens": self.max_tokens, "out_of_memory": self.out_of_memory}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned. An empty state is a no-op."""
        self.max_tokens = state.get("max_tokens", self.max_tokens)
        self.out_of_memory = state.get("out_of_memory", self.out_of_memory)

    def attempts(self, longest: int) -> Iterator[Attempt]:
        """Yield an attempt, and after each out-of-memory another one with half the tokens a row.

            for attempt in budget.attempts(longest):
                with attempt:
                    result = work(attempt.max_tokens)

        The work must have no side effects when it raises RowMemoryError. The budget never goes below `longest`, the
        tokens of the longest sequence. The smaller budget stays for later calls.

        Raises MemoryLimitError if the longest sequence does not fit, and ShorterRowsError if the other ranks cannot
        start again.
        """
        while True:
            # A later update may have a longer sequence than the one for which the budget was halved.
            attempt = Attempt(max(self.max_tokens, longest))
            yield attempt
            if not attempt.failed:
                return
            if attempt.here_only:
                raise self._give_up(longest, attempt.reason)
            self._halve(longest, attempt.reason)

    def _give_up(self, longest: int, reason: str) -> MemoryLimitError:
        smaller = max(longest, self.max_tokens // 2)
        kind, remedy = MemoryLimitError, "Set"
        if self.cap is not None and smaller < self.max_tokens:
            self.cap(smaller)
            kind = ShorterRowsError
            remedy = f"The same command resumes with rows of {smaller}. If that is not enough, set"
        return kind(
            f"out of memory with packed rows of {self.max_tokens} tokens, and the other ranks are inside a collective, "
            f'so this update cannot be retried. {remedy} dist.sequence_parallel = 2 or optim.optimizer = "offload" '
            f"({reason})"
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
        self.message(
            f"out of memory with packed rows of {before} tokens; the update is retried with {self.max_tokens}. The "
            f"gradient is the same. Set optim.max_tokens_per_rank = {self.max_tokens} to save the retry ({reason})"
        )
        free_memory()


def free_memory() -> None:
    """Free memory that nothing refers to, the allocator's cache included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True if an allocation failed, on the GPU or the CPU. torch has no exception type for the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


# Allocations that do not go through torch's own allocators.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
