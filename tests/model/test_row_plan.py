"""Rows and ranks: nothing lost or split, the same number of rows everywhere, level costs, full rows, in time."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from or1.core.types import TrainSequence
from or1.model.row_plan import Row, SequenceCost, plan_ranks, plan_rows
from or1.model.rows import pack_rows

# Qwen2.5-7B: attention over 32K tokens costs about half of what the matrices do.
COST = SequenceCost(linear=1.0, quadratic=1 / 70_000)
MAX_TOKENS = 34_816


def slots_used(rows: list[Row], lengths: list[int], max_tokens: int) -> float:
    """Share of the token slots of these rows that hold a token, 0 to 1."""
    return sum(lengths[i] for row in rows for i in row) / (len(rows) * max_tokens)


def imbalance(plan: list[list[Row]], lengths: list[int], cost: SequenceCost) -> float:
    """Cost of the most expensive rank over the mean of the ranks; 1 is perfect."""
    totals = [sum(cost.of([lengths[i] for i in row]) for row in rows) for rows in plan]
    return max(totals) * len(totals) / sum(totals)


def long_tailed(count: int, seed: int = 0, median: float = 6000, limit: int = 32_768) -> list[int]:
    """Return log-normal lengths of chain-of-thought responses, cut at the response limit."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(np.log(median), 0.8, count), 32, limit).astype(int).tolist()


@given(
    lengths=st.lists(st.integers(1, 64), max_size=120),
    spare=st.integers(0, 40),
    ranks=st.integers(1, 9),
    quadratic=st.sampled_from([0.0, 0.01, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_every_sequence_is_whole_in_one_row_of_one_rank(
    lengths: list[int], spare: int, ranks: int, quadratic: float
) -> None:
    capacity = max(lengths, default=1) + spare
    plan = plan_ranks(lengths, capacity, ranks, SequenceCost(1.0, quadratic))
    assert len(plan) == ranks and len({len(rows) for rows in plan}) == 1
    rows = [row for rows in plan for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    # The fewest rows that best fit reaches and that every rank has as many of.
    assert len(rows) == -(-len(plan_rows(lengths, capacity)) // ranks) * ranks
    assert sum(not row for row in rows) == max(0, len(rows) - len(lengths))
    assert all(row for rows in plan for row in rows[:-1]), "an empty row that is not its rank's last"
    assert plan == plan_ranks(lengths, capacity, ranks, SequenceCost(1.0, quadratic))


def test_nearly_all_token_slots_are_used_on_a_long_tail() -> None:
    for seed in range(5):
        lengths = long_tailed(4096, seed)
        assert max(lengths) == 32_768 and np.median(lengths) < 8000
        assert slots_used(plan_rows(lengths, MAX_TOKENS), lengths, MAX_TOKENS) >= 0.98
        plan = plan_ranks(lengths, MAX_TOKENS, 8, COST)
        assert slots_used([row for rows in plan for row in rows], lengths, MAX_TOKENS) >= 0.98


@pytest.mark.parametrize(("count", "ranks", "bound"), [(4096, 8, 1.005), (2048, 64, 1.03), (256, 8, 1.03)])
def test_ranks_cost_the_same_in_sum_and_row_by_row(count: int, ranks: int, bound: float) -> None:
    for seed in range(3):
        lengths = long_tailed(count, seed)
        plan = plan_ranks(lengths, MAX_TOKENS, ranks, COST)
        assert imbalance(plan, lengths, COST) <= bound
        # Ranks wait for the slowest after every row.
        slowest = sum(max(COST.of([lengths[i] for i in rows[k]]) for rows in plan) for k in range(len(plan[0])))
        assert slowest <= (bound + 0.02) * COST.of(lengths) / ranks


def test_the_quadratic_term_is_what_balances_attention() -> None:
    lengths = [32_768] * 8 + [1024] * 256
    blind = imbalance(plan_ranks(lengths, MAX_TOKENS, 4), lengths, COST)
    aware = imbalance(plan_ranks(lengths, MAX_TOKENS, 4, COST), lengths, COST)
    assert aware <= blind and aware < 1.01


def test_4096_sequences_are_planned_in_5_ms() -> None:
    lengths = long_tailed(4096)
    seconds = {8: [], 64: []}
    for _ in range(20):
        for ranks, measured in seconds.items():
            # The search is one thread: its own time is the time on a machine that others do not use.
            began = time.thread_time()
            plan_ranks(lengths, MAX_TOKENS, ranks, COST)
            measured.append(time.thread_time() - began)
    assert {ranks: min(s) for ranks, s in seconds.items() if min(s) >= 5e-3} == {}


def test_thousands_of_short_sequences_do_not_make_the_search_quadratic() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 20_000).tolist()
    began = time.thread_time()
    plan = plan_ranks(lengths, 200_000, 3, COST)
    assert time.thread_time() - began < 0.5
    assert imbalance(plan, lengths, COST) < 1.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 9], 8, 2, COST), r"sequence 1 has 9 tokens.*1 to 8.*max_tokens_per_rank"),
        (([3], 8, 0, COST), "ranks is 0"),
        (([3], 8, 2, SequenceCost(-1.0)), "linear is -1"),
        (([3], 8, 2, SequenceCost(1.0, float("nan"))), "quadratic -?nan"),
    ],
)
def test_what_cannot_be_planned_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_ranks(*arguments)


def test_a_planned_row_holds_its_sequences_and_an_empty_one_is_an_anchor() -> None:
    ids = np.arange(9, dtype=np.int32)
    sequences = [TrainSequence(ids[:p], ids[:r], np.zeros(r), 1.0) for p, r in ((2, 3), (1, 5))]
    plan = plan_ranks([s.packed_tokens for s in sequences], 8, 3)
    batches = [list(pack_rows(sequences, rows)) for rows in plan]
    trained = sorted(len(batch.rows_N) for (batch,) in batches)
    assert trained == [0, 3, 5]
    anchor = next(batch for (batch,) in batches if not len(batch.rows_N))
    assert anchor.ids_T.tolist() == [0] and anchor.cu_seqlens.tolist() == [0, 1]
    assert anchor.cu_seqlens.dtype == torch.int32 and anchor.targets_N.dtype == torch.int64
