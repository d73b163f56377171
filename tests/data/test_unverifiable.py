"""Problems whose gold answers cannot be verified: counted in each step, named once in a run, kept over a resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from or1.core import codec
from or1.core.metric_names import metric
from or1.core.types import Group, Prompt, Response, Score, Status
from or1.data.unverifiable import UnverifiableRows, unverifiable_text
from or1.eval.accuracy import Outcome, summarise_set
from or1.reward.math import equivalent_job
from or1.reward.parts import Part, weighted_sum
from or1.reward.scorers import MathScorer
from or1.reward.terms import UNVERIFIABLE
from or1.run.in_flight import InFlight
from or1.train.metrics import rollout_metrics

CLOCK, PROSE = r"05\!:\!00", "as many as there are stars in the sky"
# math-verify reads no part of this as LaTeX, and takes 2 for the whole.
MISREAD = r"2007 + \frac{\unknown 2"


def prompt(gold: str, name: str = "t") -> Prompt:
    return Prompt(name, "t", "?", np.array([1]), (gold,))


def response(answer: str) -> Response:
    return Response(np.array([1], np.int32), np.zeros(1, np.float32), "stop", 0, f"\\boxed{{{answer}}}")


def group(name: str, gold: str, scores: Sequence[Score]) -> Group:
    return Group(prompt(gold, name), tuple(response("1") for _ in scores), tuple(scores))


RIGHT, WRONG = Score(1.0, Status.OK), Score(0.0, Status.WRONG)
LOST = Score(0.0, Status.WRONG, UNVERIFIABLE)


def test_a_wrong_answer_says_so_if_its_gold_has_no_value() -> None:
    golds = {CLOCK: True, PROSE: True, MISREAD: True, "7": False, r"a + b + c": False, r"\approx 8.24": False}
    golds |= {r"\frac{2469}{20,\!000}": False, r"\text{Evelyn}": False, "(1, 2]": False, r"x \le 3": False}
    scores = {gold: equivalent_job({"box": "999", "golds": [gold]}) for gold in golds}
    assert {gold: score.cause == UNVERIFIABLE for gold, score in scores.items()} == golds
    assert {score.status for score in scores.values()} == {Status.WRONG}
    # One gold of a list is enough.
    assert not equivalent_job({"box": "999", "golds": [CLOCK, "7"]}).cause


def test_the_scorer_passes_the_cause_on() -> None:
    with MathScorer(workers=1, timeout_s=60) as scorer:
        answers = [("5:01", CLOCK), ("5:01", CLOCK), ("05:00", CLOCK), ("x", "7")]
        scores = [scorer.submit(prompt(gold), response(answer)).result() for answer, gold in answers]
    assert [(score.reward, score.cause) for score in scores] == [(0, UNVERIFIABLE)] * 2 + [(1, ""), (0, "")]
    assert weighted_sum([Part("a", 1.0), Part("b", 1.0)], [RIGHT, LOST]).cause == UNVERIFIABLE
    assert codec.loads(codec.dumps(LOST)).cause == UNVERIFIABLE


def test_groups_are_counted_only_if_there_are_any() -> None:
    groups = [group("a", CLOCK, [LOST, LOST]), group("b", "7", [RIGHT, WRONG]), group("c", PROSE, [RIGHT, LOST])]
    assert rollout_metrics(groups)[metric("reward/unverifiable").name] == 2
    assert "reward/unverifiable" not in rollout_metrics(groups[1:2])


def test_an_evaluation_counts_its_problems() -> None:
    groups = [group("a", CLOCK, [LOST, LOST]), group("b", "7", [RIGHT, WRONG])]
    result = summarise_set("held", [Outcome.of(each) for each in groups], [1])
    assert result.metrics()["eval/held/unverifiable"] == 1
    assert result.remark() == f"held: {unverifiable_text(1)}"
    fine = summarise_set("held", [Outcome.of(groups[1])], [1])
    assert "eval/held/unverifiable" not in fine.metrics() and fine.remark() == ""


def test_a_problem_is_named_once_in_a_run() -> None:
    rows = UnverifiableRows()
    assert rows.note([group("b", "7", [WRONG])]) == ""
    first = rows.note([group("a", CLOCK, [LOST]), group("b", "7", [WRONG])])
    assert first == f"{unverifiable_text(1)}: a {CLOCK!r}"
    resumed = UnverifiableRows()
    resumed.load_state(rows.state_dict())
    assert resumed.note([group("a", CLOCK, [LOST])]) == ""
    many = resumed.note([group(f"row {i:02}", PROSE, [LOST]) for i in range(25)])
    assert "25 problems" in many and "row 00" in many and many.endswith("and 5 more")
    assert len(resumed.ids) == 26


def test_a_checkpoint_keeps_the_cause_of_a_group_in_flight() -> None:
    class Words:
        def decode(self, ids: list[int], **_: Any) -> str:
            return ""

    own = prompt(CLOCK)
    carried = Group(own, (response("1"),) * 3, (LOST, WRONG, Score(0.0, Status.WRONG, UNVERIFIABLE, (("m", 0.0),))))
    state, tensors = InFlight(carried=[carried]).to_checkpoint([own])  # type: ignore[list-item]
    (found,) = InFlight.from_checkpoint(state, tensors, [own], Words()).carried  # type: ignore[arg-type]
    assert [score and score.cause for score in found.scores] == [UNVERIFIABLE, "", UNVERIFIABLE]
    assert found.scores == carried.scores
