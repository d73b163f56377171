"""Scorers as the config asks for them: code and mathematics by row, cut programs, what must work and what need not."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from or1.config import RewardConfig
from or1.core.errors import ScorerError
from or1.core.types import CodeTests, Prompt, Response, Score, Status
from or1.reward import make_scorer
from or1.reward.code.grade import CodeSettings, grade_job
from or1.reward.code.sandbox import find_sandbox
from or1.reward.ground_truth import parse_ground_truth


@pytest.fixture(scope="module")
def settings() -> CodeSettings:
    try:
        return CodeSettings(find_sandbox("auto"), 2.0, 20.0, 1024, 16, 4, False)
    except ScorerError as error:
        pytest.skip(str(error))


def score(program: str, truth: object, settings: CodeSettings, **changes: object) -> Score:
    tests = parse_ground_truth(truth)
    return grade_job({"program": program, "tests": asdict(tests), "settings": asdict(settings) | changes})


ADD = {"inputs": ["1 2\n", "3 4\n", "5 6\n", "0 0\n"], "outputs": ["3\n", "7\n", "11\n", "0\n"]}
READ = "a, b = map(int, input().split())\n"


def prompt(tests: CodeTests | None = None, golds: tuple[str, ...] = ()) -> Prompt:
    return Prompt("t:1", "t", "?", np.array([1], dtype=np.int32), golds, tests)


def response(text: str, finish: str = "stop") -> Response:
    return Response(np.array([1], dtype=np.int32), np.zeros(1, dtype=np.float32), finish, 0, text)


def test_auto_takes_code_and_mathematics_by_row(settings: CodeSettings) -> None:
    code, maths = prompt(parse_ground_truth(ADD)), prompt(golds=("7",))
    program = f"```python\n{READ}print(a + b)\n```"
    with make_scorer(RewardConfig(workers=1, require_think_close=True), [code, maths]) as scorer:
        cases = [
            (code, f"<think>hm</think>{program}", Status.OK),
            (code, "<think>hm</think> it is easy", Status.NO_ANSWER),
            (code, f"<think>{program}</think> so", Status.NO_ANSWER),
            (code, program, Status.TRUNCATED),
            (maths, r"<think></think>\boxed{7}", Status.OK),
            (maths, f"<think></think>{program}", Status.NO_ANSWER),
        ]
        found = [scorer.submit(p, response(text)).result(timeout=60).status for p, text, _ in cases]
        assert found == [status for *_, status in cases]
        cut = scorer.submit(code, response(f"<think>hm</think>{program}", "length"))
        assert cut.result(timeout=60) == Score(0.0, Status.TRUNCATED)


def test_cut_programs_are_run_if_the_config_says_so(settings: CodeSettings) -> None:
    code = prompt(parse_ground_truth(ADD))
    cases = [(f"```python\n{READ}print(a + b)\n```\nNow", Status.OK), (f"```python\n{READ}pri", Status.NO_ANSWER)]
    with make_scorer(RewardConfig(workers=1, grade_truncated=True), [code]) as scorer:
        for text, status in cases:
            found = scorer.submit(code, response(text, "length")).result(timeout=60)
            assert found == Score(float(status is Status.OK), status)


def test_only_what_the_data_needs_must_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from or1.reward.code import sandbox

    monkeypatch.setattr(sandbox, "_problem", lambda kind: "not here")
    with make_scorer(RewardConfig(workers=1), [prompt(golds=("7",))]) as scorer:
        assert scorer.submit(prompt(golds=("7",)), response(r"\boxed{7}")).result(timeout=60).status is Status.OK
    with pytest.raises(ScorerError, match="no sandbox works here"):
        make_scorer(RewardConfig(workers=1), [prompt(parse_ground_truth(ADD))])


@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_without_a_sandbox_programs_run_if_the_config_says_so(tmp_path: Path, settings: CodeSettings) -> None:
    assert score(READ + "print(a + b)", ADD, settings, sandbox="none") == Score(1.0, Status.OK)
    here = os.getcwd()
    program = f"import os\nassert os.getcwd() != {here!r} and 'HF_TOKEN' not in os.environ\n{READ}print(a + b)"
    assert score(program, ADD, settings, sandbox="none") == Score(1.0, Status.OK)
