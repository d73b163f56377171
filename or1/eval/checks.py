"""Checks of gold answers and tests: does the worked solution end with the answer, and does a reference program pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from or1.config import CodeRewardConfig, RewardConfig
from or1.core.types import Prompt, Response, Score, Status
from or1.reward import make_scorer
from or1.reward.pool import WorkerPool
from or1.reward.scorers import MATH_MEMORY_BYTES

OK, UNCHECKED, NO_REFERENCE = "ok", "unchecked", "no_reference"
MOST_REFERENCES = 3
"""Reference programs of a problem that are tried; data sets list up to hundreds."""

Check = Callable[[Prompt], Callable[[], str]]
"""Starts the check of a problem, and returns the function that waits for its verdict."""


@contextmanager
def open_checks(prompts: Sequence[Prompt], workers: int, timeout_s: float) -> Iterator[Check]:
    """Start the processes that the problems need. Verdicts are OK, UNCHECKED, or the reason to drop the problem.

    A maths problem without a worked solution is UNCHECKED. A programming problem without a reference is dropped.

    workers    processes of each kind
    timeout_s  limit in seconds for one answer; programs have the limits of [reward.code]

    Raises ScorerError if a worker cannot start or no sandbox works.
    """
    with ExitStack() as stack:
        maths = programs = None
        if any(prompt.tests is None and worked_text(prompt.row) for prompt in prompts):
            maths = WorkerPool(
                "or1.reward.math:extracted_job",
                workers=workers,
                memory_limit_bytes=MATH_MEMORY_BYTES,
                plain_environment=True,
            )
            stack.callback(maths.close)
        if any(prompt.tests is not None for prompt in prompts):
            config = RewardConfig(kind="code", workers=workers, code=CodeRewardConfig())
            programs = stack.enter_context(make_scorer(config))

        def check(prompt: Prompt) -> Callable[[], str]:
            if prompt.tests is not None:
                assert programs is not None
                scores = [programs.submit(prompt, _answer(text)) for text in references(prompt.row)]
                return lambda: _best(scores)
            if not (text := worked_text(prompt.row)):
                return lambda: UNCHECKED
            assert maths is not None
            score = maths.submit({"text": text, "golds": list(prompt.golds)}, timeout_s, prompt.id)
            return lambda: _verdict(score.result(), "answer")

        yield check


def worked_text(row: Mapping[str, Any]) -> str:
    """Return the worked solution of a maths row, "" without one: column `solution`, or what precedes `####`."""
    solution, answer = row.get("solution"), row.get("answer")
    if isinstance(answer, str) and "####" in answer:
        return answer.rpartition("####")[0].strip()
    # Without an answer of its own the row takes its gold from the solution, and there is nothing to compare.
    gold = answer if answer is not None else row.get("reward_model")
    return solution.strip() if isinstance(solution, str) and gold is not None else ""


def references(row: Mapping[str, Any]) -> list[str]:
    """Return the first reference programs of a row, from `solutions`, `solution`, `canonical_solution` or `code`."""
    value = next((row[name] for name in ("solutions", "solution", "code") if row.get(name)), None)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if value is None and isinstance(body := row.get("canonical_solution"), str):
        start = row.get("prompt")
        value = f"{start if isinstance(start, str) else ''}{body}"
    found = value if isinstance(value, list | tuple) else [value]
    return [text for text in found if isinstance(text, str) and text.strip()][:MOST_REFERENCES]


def _answer(program: str) -> Response:
    text = program if "```" in program else f"```python\n{program}\n```"
    return Response(np.empty(0, np.int32), np.empty(0, np.float32), "stop", 0, text)


def _best(scores: Sequence[Future[Score]]) -> str:
    """Return OK if one program passes, else the verdict on the first."""
    verdicts = [_verdict(score.result(), "reference") for score in scores]
    return OK if OK in verdicts else (verdicts or [NO_REFERENCE])[0]


def _verdict(score: Score, what: str) -> str:
    return OK if score.status is Status.OK else f"{what}_{score.status.value}"
