"""Every unit is taken once whoever asks when, batches do not depend on the taker, and what is long starts first."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from or1.core.types import Group, OpenGroup, Prompt, Response, Score, Status
from or1.rollout.dealing import (
    Alone,
    Dealt,
    Given,
    Hand,
    ResponseLengths,
    Window,
    fixed_units,
    longest_first,
    single_units,
)
from or1.rollout.engine import Job, Sampling, jobs_of

from .conftest import prompts_of


def jobs(prompts: int, samples: int = 4) -> list[Job]:
    return list(jobs_of(prompts_of(prompts), Sampling(1.0, 100, samples, seed=1), None))


def response(tokens: int, finish: str = "stop") -> Response:
    return Response(np.zeros(tokens, np.int32), np.zeros(tokens, np.float32), finish, 0, "")


@pytest.mark.parametrize("count", [0, 1, 3, 16, 100, 1000])
@pytest.mark.parametrize("takers", [1, 2, 7, 64])
def test_every_unit_is_taken_once_by_whoever_asks(count: int, takers: int) -> None:
    rng, counter = random.Random(count + takers), Alone()
    hands = [Hand(count, takers, taker, room=8, counter=counter) for taker in range(takers)]
    taken: list[int] = []
    asking = list(range(takers))
    while asking:
        taker = rng.choice(asking)
        found = hands[taker].take(rng.choice([1, 2, 30]))
        taken += found
        if not found:
            assert hands[taker].take(5) == [], "no more means no more"
            asking.remove(taker)
    assert sorted(taken) == list(range(count))


def test_a_taker_that_is_late_finds_its_part_of_the_longest() -> None:
    counter = Alone()
    early, late = (Hand(40, 2, taker, room=4, counter=counter) for taker in range(2))
    taken = early.take(100)
    while found := early.take(100):
        taken += found
    assert late.take(100) == [1, 2, 5, 6] and sorted([*taken, 1, 2, 5, 6]) == list(range(40))


def test_the_last_units_go_out_one_at_a_time() -> None:
    hand = Hand(64, 4, 0, room=2, counter=Alone())
    sizes = []
    while found := hand.take(30):
        sizes.append(len(found))
    assert sizes[0] == 2 and sizes[1] == 7 and sizes[-4:] == [1] * 4 and sorted(sizes[1:], reverse=True) == sizes[1:]


def test_batches_are_those_of_a_fixed_share_whatever_is_expected() -> None:
    all_jobs = jobs(7)
    shares = [[job for job in all_jobs if job.slot[0] % 3 == rank] for rank in range(3)]
    batches = [[job.slot for job in share[at : at + 5]] for share in shares for at in range(0, len(share), 5)]
    for seed in range(3):
        expected = np.random.default_rng(seed).random(len(all_jobs)).tolist()
        units = fixed_units(all_jobs, expected, size=5, parts=3)
        assert sorted([job.slot for job in unit] for unit in units) == sorted(batches)
        longest = [max(expected[all_jobs.index(job)] for job in unit) for unit in units]
        assert longest == sorted(longest, reverse=True)
    dealt = Dealt(units, Hand(len(units), 1, 0, 1, Alone()), batches=True)
    assert [job.slot for job in dealt.take(500)] == [job.slot for job in units[0]], "one batch at a time"


def test_an_engine_holds_few_responses_without_a_token_if_others_could_start_them() -> None:
    shared, own = Window(64, shared=True), Window(64, shared=False)
    assert shared.room(0, 0) == 8 and own.room(0, 0) == 64
    assert shared.room(20, 8) == 0 and shared.room(20, 3) == 5 and shared.room(62, 0) == 2
    assert own.room(64, 0) == 0 and Window(1, shared=True).room(0, 0) == 1
    given = Given(jobs(2))
    assert len(given.take(3)) == 3 and len(given.take(64)) == 5 and given.take(64) == []


def test_what_is_expected_to_be_long_comes_first() -> None:
    prompts = [
        replace(prompt, row={"extra_info": {"model_difficulty": {"a": solved, "b": None}}})
        for prompt, solved in zip(prompts_of(3), (16, 0, 8), strict=True)
    ]
    lengths = ResponseLengths()
    asked = list(jobs_of(prompts, Sampling(1.0, 1000, 2, seed=1), None))
    expected = lengths.expected(prompts, asked)
    assert expected == [250, 250, 750, 750, 500, 500], "a hard prompt is expected to be long"
    lengths.note([Group(prompts[0], (response(900), response(700)), (Score(1.0, Status.OK),) * 2)])
    assert lengths.expected(prompts, asked)[:2] == [800, 800], "the last visit says more"
    assert [unit[0].slot for unit in single_units(asked, expected)] == [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]
    assert longest_first([1.0, 1.0, 2.0]) == [2, 0, 1]
    restored = ResponseLengths()
    restored.load_state(lengths.state_dict())
    assert restored == lengths and lengths.copy().tokens is not lengths.tokens


def test_finished_siblings_say_most_about_a_carried_response() -> None:
    prompt, other = prompts_of(2)
    open_ = OpenGroup(
        prompt, (response(300), response(100, "length"), response(500, "length")), (Score(1.0, Status.OK), None, None)
    )
    slots = {(0, 1): open_.responses[1], (0, 2): open_.responses[2], (1, 0): None}
    asked = list(jobs_of([prompt, other], Sampling(1.0, 1000, 3, seed=1, new_tokens=400), slots))
    lengths = ResponseLengths({prompt.id: 50, other.id: 120})
    # 300 in all for the first; the second is longer already, so it grows by half; both within the call's limit.
    assert lengths.expected([prompt, other], asked, [open_]) == [200, 250, 120]
    assert lengths.expected([other, prompt], [asked[2]._replace(slot=(0, 0))]) == [120]
    assert isinstance(prompt, Prompt)
