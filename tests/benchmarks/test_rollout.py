"""The benchmark of dealing: two real ranks of unequal speed, and a simulated step."""

from __future__ import annotations

import pytest

from benchmarks.rollout.cases import FORESEEN, LIMIT, SAMPLES, Step, simulate
from benchmarks.rollout.paced import one_rollout, rollout_of
from or1.dist.world import SINGLE
from tests.helpers.ranks import run_ranks

SLOW_S, FAST_S = 0.012, 0.003


@pytest.mark.slow
def test_a_fast_rank_takes_the_work_of_a_slow_one_and_the_result_is_the_same() -> None:
    alone = rollout_of(SINGLE, 0.0001, by_demand=True)
    static, demand = (run_ranks(one_rollout, 2, (SLOW_S, FAST_S), by_demand) for by_demand in (False, True))
    for found in (*static, *demand):
        assert [found[key] for key in ("prompts", "tokens", "rewards")] == [
            alone[key] for key in ("prompts", "tokens", "rewards")
        ]
    assert static[0]["idle"] == static[1]["idle"] > 0.25, "the fast rank waits for three quarters of the time"
    assert demand[0]["idle"] < 0.5 * static[0]["idle"]
    assert demand[0]["seconds"] < 0.8 * static[0]["seconds"]


def test_a_simulated_step_generates_every_token_and_demand_leaves_less_idle() -> None:
    step = Step.draw(8000, 0.6, seed=1, prompts=32)
    assert step.lengths.shape == (32, SAMPLES) and step.lengths.max() <= LIMIT
    # `simulate` raises if tokens are missing.
    static, demand = (simulate(step, 4, order) for order in ("static", "demand"))
    assert demand["idle"] < 0.1 < static["idle"] and demand["seconds"] < static["seconds"]
    assert demand["calls"] > 0 == static["calls"]
    foreseen = simulate(step, 4, FORESEEN)
    assert foreseen["idle"] < demand["idle"]
    for found in (static, demand, foreseen):
        assert 0.5 * demand["seconds"] < found["least_s"] < found["seconds"]
    halves = [simulate(step, 4, order, lambda rank: 0.5 if rank == 0 else 1.0) for order in ("static", "demand")]
    assert halves[1]["idle"] < 0.6 * halves[0]["idle"]
