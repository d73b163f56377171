"""The order in which a run takes prompts: pinned, mixtures, and prompts that an earlier stage solved."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from or1.config import Config
from or1.core.types import Group, Response, Score, Status
from or1.data import DataError, Pool, Sampler, SamplerState, SolvedPrompts, load_problems
from tests.helpers.problem_rows import NO_IDS, ask, write


def test_the_order_is_pinned() -> None:
    # A run resumes by this order; if it must change, old checkpoints must not be accepted.
    order = [5, 0, 1, 4, 2, 6, 3, 7]
    assert Sampler(8, seed=1).take(SamplerState(), 8)[0].tolist() == order
    assert Sampler(8, seed=2).take(SamplerState(), 8)[0].tolist() != order
    assert Sampler(8, seed=1).take(SamplerState(epoch=1), 8)[0].tolist() != order


@pytest.mark.parametrize("counts", [[1] * 30, [7, 7, 7, 9], [30], [0, 10, 10, 10]])
def test_the_order_does_not_depend_on_how_it_is_taken(counts: list[int]) -> None:
    state, taken = SamplerState(), []
    for count in counts:
        # A new Sampler each time: nothing but the state carries over.
        indices, state = Sampler(10, seed=3).take(state, count)
        assert len(indices) == count and 0 <= state.cursor < 10
        taken += indices.tolist()
    assert state == SamplerState(epoch=3, cursor=0)
    assert taken == Sampler(10, seed=3).take(SamplerState(), 30)[0].tolist()
    epochs = np.reshape(taken, (3, 10))
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


@pytest.mark.parametrize("state", [SamplerState(0, 10), SamplerState(0, -1), SamplerState(-1, 0)])
def test_a_state_of_other_data_is_refused(state: SamplerState) -> None:
    with pytest.raises(DataError, match="does not fit 10 prompts; resume with the data files the run started with"):
        Sampler(10, seed=1).take(state, 1)


def test_a_sampler_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="at least 1 prompt"):
        Sampler(0, seed=1)


POOLS = (Pool(0, 5, 1.0), Pool(5, 20, 1.0), Pool(25, 75, 3.0))


def test_a_mixture_keeps_its_shares_and_repeats_no_prompt_before_all_came() -> None:
    sampler = Sampler(100, seed=4, pools=POOLS)
    order = sampler.take(SamplerState(), 500)[0].reshape(5, 100)
    for epoch in order:
        shares = [int(((epoch >= p.start) & (epoch < p.start + p.size)).sum()) for p in POOLS]
        assert shares == [20, 20, 60]
    small, middle = order[0][order[0] < 5], order[0][(order[0] >= 5) & (order[0] < 25)]
    assert set(Counter(small.tolist()).values()) == {4} and len(set(middle.tolist())) == 20
    # 60 of the 75 in the first epoch; the 15 others open the second, so 300 draws are four rounds.
    large = order[order >= 25]
    assert len(set(large[:60].tolist())) == 60 and set(Counter(large.tolist()).values()) == {4}


@pytest.mark.parametrize("counts", [[1] * 40, [13, 27], [40]])
def test_a_mixture_does_not_depend_on_how_it_is_taken(counts: list[int]) -> None:
    pools = (Pool(0, 3, 1.0), Pool(3, 8, 2.0))
    state, taken = SamplerState(), []
    for count in counts:
        indices, state = Sampler(11, seed=3, pools=pools).take(state, count)
        taken += indices.tolist()
    assert taken == Sampler(11, seed=3, pools=pools).take(SamplerState(), 40)[0].tolist()
    assert taken != Sampler(11, seed=4, pools=pools).take(SamplerState(), 40)[0].tolist()


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"weight 0\.001 of 1\.001, which is less than one of the 10 prompts"):
        Sampler(10, seed=1, pools=(Pool(0, 5, 1.0), Pool(5, 5, 0.001)))


def test_skipping_keeps_the_order_of_the_others_and_the_place() -> None:
    sampler = Sampler(10, seed=3)
    plain = sampler.take(SamplerState(), 30)[0]
    skip = np.isin(np.arange(10), [2, 7, 9])
    head, state = sampler.take(SamplerState(), 4)
    tail, _ = sampler.take(state, 17, skip)
    expected = [i for i in plain[4:].tolist() if i not in (2, 7, 9)]
    assert head.tolist() == plain[:4].tolist() and tail.tolist() == expected[:17]
    # One at a time, each with a sampler of its own: the same.
    one_by_one = []
    for _ in range(17):
        index, state = Sampler(10, seed=3).take(state, 1, skip)
        one_by_one += index.tolist()
    assert one_by_one == tail.tolist()
    with pytest.raises(DataError, match=r"all 10 prompts are to be skipped; .*drop_solved"):
        sampler.take(SamplerState(), 1, np.ones(10, bool))


def group(name: str, *rewards: float) -> Group:
    response = Response(NO_IDS, np.empty(0, np.float32), "stop", 0, "")
    scores = tuple(Score(r, Status.OK if r else Status.WRONG) for r in rewards)
    return Group(ask("q", name), (response,) * len(rewards), scores)


def test_a_stage_drops_what_the_one_before_solved_every_time_it_came() -> None:
    solved = SolvedPrompts()
    assert solved.enter(0) == 0 and solved.mask([ask("q", "a")]) is None
    solved.note([group("a", 1, 1), group("b", 1, 0), group("c", 1, 1), group("d", 0.5, 0.5)])
    solved.note([group("c", 1, 0), group("a", 1, 1)])
    state, solved = json.loads(json.dumps(solved.state_dict())), SolvedPrompts()
    solved.load_state(state)
    assert solved.enter(0) == 0 and solved.enter(1) == 1 and solved.enter(1) == 0
    assert solved.mask([ask("q", name) for name in "abcd"]).tolist() == [True, False, False, False]
    solved.note([group("b", 1, 1)])
    assert solved.enter(2) == 1 and solved.dropped == {"a", "b"}


def test_a_prompt_solved_by_now_is_dropped_where_the_last_visit_counts() -> None:
    for visits, dropped in (("all", {"b"}), ("last", {"a", "b"})):
        solved = SolvedPrompts()
        solved.note([group("a", 1, 0), group("b", 1, 1), group("c", 1, 1)], visits)
        solved.note([group("a", 1, 1), group("c", 0, 1)], visits)
        solved.enter(1)
        assert solved.dropped == dropped


def config(tmp_path: Path, **data: object) -> Config:
    return Config(run_dir=str(tmp_path / "run"), model={"path": "m"}, data=data, eval={"sets": data.pop("sets", ())})


SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."
HELD_OUT = [
    "Every morning Aya goes for a nine kilometer long walk and stops at a coffee shop afterwards." + SUFFIX,
    "Let ABC be a triangle inscribed in a circle whose centre lies on the side AB of length ten." + SUFFIX,
    "Find the number of ways to place eight rooks on a board so that no two attack each other." + SUFFIX,
    "What is 12+7?",
    "Find the sum of all primes below 20",
]


def test_a_mixture_of_files_becomes_pools_without_what_was_left_out(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", *({"question": q, "answer": "1"} for q in ("a", HELD_OUT[0], "b")))
    two = write(tmp_path / "two.jsonl", *({"question": q, "answer": "1"} for q in "cdef"))
    held = write(tmp_path / "held.jsonl", *({"question": q, "answer": "1"} for q in HELD_OUT))
    mix = [{"path": str(one), "weight": 2}, {"path": str(two), "weight": 1}]
    settings = config(tmp_path, mix=mix, decontaminate="drop", decontaminate_against=str(held))
    found = load_problems(settings, None)
    assert [p.text for p in found.prompts] == list("abcdef")
    assert found.pools == (Pool(0, 2, 2.0), Pool(2, 4, 1.0))
