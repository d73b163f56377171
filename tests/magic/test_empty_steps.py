"""Steps that train nothing: when a run says so, what it has seen, and what it advises."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from or1.core.types import Group, Score, Status
from or1.magic.empty_steps import note_step, nothing_trained
from tests.helpers.hand_run import EOS, ONE, ZERO, config_of, group, learn, response, trainer_of


def of_statuses(*statuses: Status, rewards: float = 0.0) -> Group:
    """Return a group whose responses have these statuses and equal rewards."""
    scores = tuple(Score(rewards, status) for status in statuses)
    return replace(group([0.0] * len(statuses), [response(ZERO)] * len(statuses)), scores=scores)


def said_after(groups: list[Group], config, steps: int = 3) -> str:
    totals: Counter[str] = Counter()
    said = [note_step(totals, groups, False, config) for _ in range(steps)]
    assert totals["empty_steps"] == steps and not any(said[:2])
    return said[-1]


def test_empty_steps_are_told_at_the_third_the_tenth_and_the_hundredth(tmp_path: Path) -> None:
    totals, config, groups = Counter(), config_of(tmp_path), [group([1, 1], [response(ZERO)] * 2)]
    told = [step for step in range(1, 1200) if note_step(totals, groups, False, config)]
    assert told == [3, 10, 100, 1000]
    assert note_step(totals, groups, True, config) == "" and totals["empty_steps"] == 1199
    assert [step for step in range(1, 12) if note_step(totals, groups, False, config)] == [3, 10]


def test_a_step_without_a_complete_group_counts_without_a_reward_message(tmp_path: Path) -> None:
    totals, config, groups = Counter(), config_of(tmp_path), [group([1, 1], [response(ZERO)] * 2)]
    said = [note_step(totals, some, False, config) for some in (groups, [], groups, [], groups)]
    assert [bool(text) for text in said] == [False] * 4 + [True] and totals["empty_steps"] == 5


@pytest.mark.parametrize(
    ("status", "reward", "seen", "remedy"),
    [
        (Status.OK, 1.0, "has reward 1 (100 % ok)", "`or1 filter` with data.keep_difficulty"),
        (Status.WRONG, 0.0, "has reward 0 (100 % wrong)", "compare some in rollouts/; `or1 filter`"),
        (Status.NO_ANSWER, 0.0, "has reward 0 (100 % no_answer)", "data.prompt_suffix"),
        (Status.TRUNCATED, 0.0, "has reward 0 (100 % truncated)", "raise max_response_tokens"),
        (Status.SKIPPED, math.nan, "no response of any group has a reward", "let it return a number"),
        (Status.TIMEOUT, math.nan, "no response of any group has a reward", "reward.timeout_s: raise it"),
        (Status.CRASH, 0.0, "has reward 0 (100 % crash)", "mend the reward"),
    ],
)
def test_the_message_names_what_was_seen_and_the_remedy_for_it(
    status: Status, reward: float, seen: str, remedy: str, tmp_path: Path
) -> None:
    text = said_after([of_statuses(status, status, rewards=reward)] * 2, config_of(tmp_path))
    assert text.startswith("nothing is trained, 3 steps in a row: ") and seen in text
    assert remedy in text and "loss.refill_rounds samples new groups" in text


def test_groups_that_differ_from_each_other_are_counted_by_reward(tmp_path: Path) -> None:
    solved, failed = (group([r, r], [response(ZERO)] * 2) for r in (1, 0))
    mixed = of_statuses(Status.NO_ANSWER, Status.NO_ANSWER, Status.NO_ANSWER)
    unknown, unscored = group([1, 0], [response(ZERO)] * 2), of_statuses(Status.SKIPPED, rewards=math.nan)
    config = config_of(tmp_path, loss={"refill_rounds": 2})
    text = said_after([solved, failed, failed, mixed, unknown, unscored], config)
    assert "within 4 of 6 groups all rewards are equal (3 with 0, 1 with 1)" in text
    assert "1 groups have no reward at all" in text and "1 groups with different rewards were left out" in text
    assert "(33.3 % wrong," not in text and "41.7 % wrong, 25 % ok, 25 % no_answer, 8.33 % skipped" in text
    assert "refill_rounds" not in text


def test_a_run_tells_it_and_a_resumed_run_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(config_of(tmp_path))
    said: list[str] = []
    monkeypatch.setattr(trainer.display, "message", said.append)
    equal = group([1, 1], [response(ZERO, EOS), response(ZERO, ONE, EOS)])
    learn(trainer, equal, step=1)
    learn(trainer, equal, step=2)
    trainer.state.load_state(json.loads(json.dumps(trainer.state.state_dict())))
    assert said == []
    learn(trainer, equal, step=3)
    assert len(said) == 1 and said[0].startswith(
        "alarm: step 3: nothing is trained, 3 steps in a row: every response of ev"
    )
    learn(trainer, group([1, 0], equal.responses), step=4)
    learn(trainer, equal, step=5)
    assert len(said) == 1 and trainer.state.totals["empty_steps"] == 4


def record(step: int, **values: float) -> dict:
    return {"step": step, "stage": 0} | {key.replace("__", "/"): value for key, value in values.items()}


def test_the_summary_says_that_a_run_had_no_update() -> None:
    empty = {"optim__updates": 0.0, "reward__mean": 1.0, "reward__status__ok": 0.75, "reward__status__wrong": 0.25}
    first = record(0, eval__heldout=0.5)
    assert nothing_trained([first, record(1, **empty), record(2, **empty)]) == (
        "nothing was trained: in none of 2 steps was a group kept (75 % ok, 25 % wrong, mean reward 1)"
    )
    assert nothing_trained([first, record(1, **empty), record(2, **empty | {"optim__updates": 1.0})]) == ""
    assert nothing_trained([first]) == "" and nothing_trained([]) == ""
    assert "complete group" in nothing_trained([record(1, optim__updates=0.0)])
    assert "not finite" in nothing_trained([record(1, **empty | {"optim__skipped": 2.0})])
