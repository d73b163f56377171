"""A reward that is a weighted sum: hand numbers, faults, a real step, and what is recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from or1.config import RewardConfig
from or1.config.load import load_config
from or1.core import codec
from or1.core.errors import ConfigError
from or1.core.types import Group, Prompt, Response, Score, Status
from or1.reward import make_scorer
from or1.reward.parts import Part, weighted_sum
from or1.run.rollout_log import read_rollouts, write_rollouts
from or1.train.metrics import rollout_metrics

CODE = """
def brief(completions, **_):
    return [None if "no opinion" in text else -float(len(text) > 20) for text in completions]

def broken(completions, **_):
    return [1 / ("boxed" in text) for text in completions]
"""
PROMPT = Prompt(id="x:1", source="x", text="1+1=", token_ids=np.array([1], np.int32), golds=("2",), row={"answer": "2"})


def response(text: str) -> Response:
    return Response(np.zeros(3, np.int32), np.zeros(3, np.float32), "stop", 0, text)


def score(reward: float, status: Status = Status.OK, cause: str = "") -> Score:
    return Score(reward, status, cause)


MATH, BRIEF = Part("math", 1.0), Part("brief", 0.25)
NONE = score(math.nan, Status.SKIPPED)


@pytest.mark.parametrize(
    ("scores", "reward", "status"),
    [
        ([score(1.0), score(-1.0, Status.WRONG)], 0.75, Status.OK),
        ([score(0.0, Status.NO_ANSWER), score(2.0)], 0.5, Status.NO_ANSWER),
        ([score(1.0), NONE], 1.0, Status.OK),
        ([NONE, score(2.0)], 0.5, Status.OK),
        ([NONE, NONE], math.nan, Status.SKIPPED),
        ([score(1.0), score(math.nan, Status.CRASH, "why")], math.nan, Status.CRASH),
        ([score(0.0, Status.CRASH, "of a verifier"), score(2.0)], 0.5, Status.CRASH),
    ],
)
def test_the_weighted_sum_by_hand(scores: list[Score], reward: float, status: Status) -> None:
    total = weighted_sum([MATH, BRIEF], scores)
    assert total.reward == pytest.approx(reward, nan_ok=True) and total.status == status
    assert [name for name, _ in total.parts] == ["math", "brief"]
    assert total.cause == next((each.cause for each in scores if each.cause), "")


def settings(tmp_path: Path, *parts: dict) -> RewardConfig:
    (tmp_path / "own.py").write_text(CODE)
    return RewardConfig(parts=parts, workers=1)


def test_a_verifier_and_a_function_score_one_response(tmp_path: Path) -> None:
    config = settings(tmp_path, {"kind": "math"}, {"kind": f"{tmp_path}/own.py:brief", "weight": 0.25})
    assert config.needs_answers and config.functions == (f"{tmp_path}/own.py:brief",)
    texts = (r"\boxed{2}", r"after much thought \boxed{2}", "no opinion", r"\boxed{3}")
    with make_scorer(config, [PROMPT]) as scorer:
        scores = [scorer.submit(PROMPT, response(text)).result(60) for text in texts]
    assert [each.reward for each in scores] == [1.0, 0.75, 0.0, 0.0]
    assert [each.status for each in scores] == [Status.OK, Status.OK, Status.NO_ANSWER, Status.WRONG]
    assert scores[1].parts == (("math", 1.0), ("brief", -1.0))
    metrics = rollout_metrics([Group(PROMPT, tuple(map(response, texts)), tuple(scores))])
    assert metrics["reward/part/math"] == 0.5
    assert metrics["reward/part/brief"] == pytest.approx(-1 / 3), "None is no reward and is not counted"


def test_a_part_that_crashes_leaves_no_reward(tmp_path: Path) -> None:
    config = settings(tmp_path, {"kind": "math"}, {"kind": f"{tmp_path}/own.py:broken", "name": "odd"})
    with make_scorer(config, [PROMPT]) as scorer:
        found = scorer.submit(PROMPT, response("nothing")).result(60)
    assert math.isnan(found.reward) and found.status is Status.CRASH and "ZeroDivisionError" in found.cause


def test_parts_travel_between_ranks_and_are_logged(tmp_path: Path) -> None:
    found = Score(0.75, Status.OK, parts=(("math", 1.0), ("brief", -1.0)))
    assert codec.loads(codec.dumps(found)) == found
    group = Group(PROMPT, (response("a"), response("b")), (found, Score(0.0, Status.WRONG, parts=(("math", 0.0),))))
    path = write_rollouts(tmp_path / "rollouts", 1, 0, [group], [np.zeros(2)])
    assert read_rollouts(path, 1, {PROMPT.id: PROMPT}, 2)[0].scores == group.scores


def test_what_cannot_be_is_named(root: Path) -> None:
    parts = json.dumps([{"kind": "math", "weight": 0}, {"kind": "no.py:math", "weight": 0}]).replace(":", "=")
    parts = parts.replace("no.py=math", "no.py:math").replace('"kind"', "kind").replace('"weight"', "weight")
    with pytest.raises(ConfigError) as caught:
        load_config(root / "examples" / "quickstart.toml", [f"reward.parts={parts}", "reward.kind=math"])
    text = str(caught.value)
    for message in (
        "reward.kind: cannot be combined with reward.parts",
        "reward.parts.1.name: 'math' is the name of an earlier part",
        "reward.parts: every weight is 0",
        "reward.parts.1.kind: no file 'no.py'",
    ):
        assert message in text
