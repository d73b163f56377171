"""Which sequences share a packed row, and which rank computes it; the search itself is C++ (csrc/packing.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Row = list[int]


@dataclass(frozen=True)
class SequenceCost:
    """What training on a sequence of n tokens costs, in any one unit: linear * n + quadratic * n^2.

    Matrix products grow with n, attention with n^2; `or1.plan.timing.sequence_cost` gives both for a model in FLOPs.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def of(self, lengths: Sequence[int]) -> float:
        """Cost of sequences of these lengths together."""
        return sum((self.linear + self.quadratic * n) * n for n in lengths)


def plan_rows(lengths: Sequence[int], max_tokens: int) -> list[Row]:
    """Rows of at most `max_tokens` tokens, best-fit decreasing: each row the indices of its sequences, ascending.

    Every sequence is in exactly one row. The plan depends on the arguments alone. Raises ValueError naming the first
    sequence that is empty or longer than a row.
    """
    # Here, not at the top: or1_kernels imports torch, and `or1 plan` needs SequenceCost without it.
    from or1_kernels import _native

    return _native.pack_best_fit(lengths, max_tokens)


def plan_ranks(
    lengths: Sequence[int], max_tokens: int, ranks: int, cost: SequenceCost | None = None
) -> list[list[Row]]:
    """`plan[rank][row]`: as many rows on every rank, so that their collectives meet, and as equal a cost.

    Row i costs about the same on all ranks too, since they wait for each other after each. Rows are empty (anchors)
    only where there are fewer sequences than rows, and are then the last of their rank. Every sequence is in exactly
    one row; every rank that calls this with the same arguments gets the same plan. cost None: tokens.

    Raises ValueError as `plan_rows`, and for ranks < 1 or a cost that is negative or not finite.
    """
    from or1_kernels import _native

    cost = cost or SequenceCost()
    return _native.plan_ranks(lengths, max_tokens, ranks, cost.linear, cost.quadratic)


def slots_used(rows: Sequence[Row], lengths: Sequence[int], max_tokens: int) -> float:
    """Share of the token slots of these rows that hold a token, 0 to 1."""
    return sum(lengths[i] for row in rows for i in row) / (len(rows) * max_tokens) if rows else 1.0


def imbalance(plan: Sequence[Sequence[Row]], lengths: Sequence[int], cost: SequenceCost) -> float:
    """Cost of the costliest rank over the mean of the ranks: 1 is perfect, `ranks` is one rank doing everything."""
    totals = [sum(cost.of([lengths[i] for i in row]) for row in rows) for rows in plan]
    mean = sum(totals) / len(totals)
    return max(totals) / mean if mean else 1.0
