"""The maths reward on real gold answers: each is right for its own problem and wrong for one with another answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from or1.core.types import Prompt, Response, Score, Status
from or1.reward.ground_truth import plain_golds
from or1.reward.scorers import MathScorer


def data(root: Path, name: str) -> Path:
    path = root.parent / "shared" / "data" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


def scores(pairs: list[tuple[str, str]]) -> list[Score]:
    """Return the score of each (answer, gold)."""
    with MathScorer(workers=2, timeout_s=10) as scorer:
        futures = []
        for answer, gold in pairs:
            prompt = Prompt("t", "t", "?", np.array([1]), plain_golds(gold))
            text = f"<think>\\boxed{{-1}}</think> So it is \\boxed{{{answer}}}."
            futures.append(scorer.submit(prompt, Response(np.array([1]), np.zeros(1), "stop", 0, text)))
        return [future.result() for future in futures]


@pytest.mark.slow
def test_gsm8k_answers_are_right_for_their_own_problem_only(root: Path) -> None:
    rows = [json.loads(line) for line in data(root, "gsm8k_train.jsonl").read_text().splitlines()]
    answers = [row["answer"].rpartition("####")[2].strip() for row in rows]
    golds = [answer.replace(",", "") for answer in answers]
    own = scores(list(zip(answers, golds, strict=True)))
    missed = [(a, s.status.value) for a, s in zip(answers, own, strict=True) if s.status is not Status.OK]
    assert len(missed) <= 0.001 * len(rows), missed

    shifted = golds[1:] + golds[:1]
    others = [(answer, gold) for answer, mine, gold in zip(answers, golds, shifted, strict=True) if mine != gold]
    wrong = scores(others)
    assert [pair for pair, score in zip(others, wrong, strict=True) if score.reward != 0] == []
    print(f"own: {len(rows) - len(missed)} of {len(rows)} right {missed}; others: all {len(others)} wrong")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_math_answers_are_right_for_their_own_problem(root: Path) -> None:
    rows = json.loads(data(root, "math_train.json").read_text())
    # A row without an answer is an error of the row.
    answers = [answer for row in rows if (answer := str(row["answer"]).strip())]
    assert len(rows) - len(answers) <= 2
    own = scores([(answer, answer) for answer in answers])
    missed = [(a, s.status.value) for a, s in zip(answers, own, strict=True) if s.status is not Status.OK]
    # Other white space defeats the comparison of strings, so that math-verify has to decide.
    respelt = scores([(answer.replace(" ", "") + "\\,", answer) for answer in answers])
    by_meaning = sum(score.status is Status.OK for score in respelt)
    print(f"{len(answers) - len(missed)} of {len(answers)} right {missed}; by meaning {by_meaning}")
    assert len(missed) <= 0.005 * len(answers), missed
    assert by_meaning >= 0.95 * len(answers)
