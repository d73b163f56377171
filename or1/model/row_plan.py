"""Assignment of sequences to packed rows and of rows to ranks; the search is in C++ (csrc/packing.cpp)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = list[int]


@dataclass(frozen=True)
class SequenceCost:
    """Cost of training on a sequence of n tokens, in any unit: linear * n + quadratic * n^2.

    Matrix products grow with n, attention with n^2. `or1.plan.timing.sequence_cost` computes both for a model in FLOPs.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def of(self, lengths: Sequence[int]) -> float:
        """Return the summed cost of sequences of these lengths."""
        return sum((self.linear + self.quadratic * n) * n for n in lengths)


def plan_rows(lengths: Sequence[int], max_tokens: int) -> list[Row]:
    """Return rows of at most `max_tokens` tokens by best-fit decreasing; a row lists sequence indices, ascending.

    Every sequence is in exactly one row. The plan is a function of the arguments. Raises ValueError naming the first
    sequence that is empty or longer than `max_tokens`.
    """
    return _native().pack_best_fit(lengths, max_tokens)


def plan_ranks(
    lengths: Sequence[int], max_tokens: int, ranks: int, cost: SequenceCost | None = None
) -> list[list[Row]]:
    """Return `plan[rank][row]`: the same number of rows on every rank, at nearly the same cost.

    Equal row counts keep the collectives of the ranks matched. Row i has about the same cost on every rank, since the
    ranks wait for each other after each row. With fewer sequences than rows, the last rows of a rank are empty; an
    empty row becomes an anchor (`or1.model.rows.pack_rows`). Every sequence is in exactly one row. The plan is a
    function of the arguments, so every rank computes the same plan.

    cost  None: the number of tokens

    Raises ValueError as `plan_rows`, and for ranks < 1 or a cost that is negative or not finite.
    """
    cost = cost or SequenceCost()
    return _native().plan_ranks(lengths, max_tokens, ranks, cost.linear, cost.quadratic)


def _native() -> Any:
    # Not imported at the top: or1_kernels imports torch, and `or1 plan` needs SequenceCost without torch.
    return importlib.import_module("or1_kernels._native")
