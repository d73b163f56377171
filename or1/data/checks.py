"""Checks of a mixture: is a gold verifiable, does a worked solution end with it, and does a reference program pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from or1.config import RewardConfig
from or1.core.result_log import ResultLog
from or1.core.types import Prompt, Response, Status

OK, MATCHED, NO_REFERENCE = "ok", "matched", "no_reference"
"""Verdicts that are no fault: a verifiable gold or a program that passes, a gold that the worked solution has too, and
no program to run."""
MOST_REFERENCES = 3
"""Reference programs of a problem that are tried; data sets list up to hundreds."""
TIMEOUT_S = 10.0
"""Limit in seconds for one maths check; programs have the limits of [reward.code]."""

_FAULTS = {Status.TIMEOUT: "timeout", Status.CRASH: "crash"}
Check = Callable[[Prompt], str]


def check_all(
    prompts: Sequence[Prompt], results: ResultLog, workers: int, progress: Callable[[int, int], None]
) -> list[str]:
    """Return the verdict on each problem: OK, MATCHED, NO_REFERENCE, or a reason to drop the problem.

    The reasons are "unparsable" (no gold has a value), "answer_differs" (the worked solution ends with another) and
    "reference_wrong"; a check may also end with "timeout" or "crash". Verdicts in `results` are not computed again.

    Raises ScorerError if a worker cannot start or no sandbox works.
    """
    keys = [check_key(prompt) for prompt in prompts]
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in results}
    if missing:
        waiting = len(missing)
        # Pools close first, so that an interrupted check does not wait for its time limit.
        with ThreadPoolExecutor(2 * workers) as threads, _open_checks(list(missing.values()), workers) as check:
            running = {threads.submit(check, prompt): key for key, prompt in missing.items()}
            try:
                for done in as_completed(running):
                    results.add(running[done], done.result())
                    waiting -= 1
                    progress(len(keys) - waiting, len(keys))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    return [results[key] for key in keys]


def check_key(prompt: Prompt) -> str:
    """Return the sha256 of what the verdict on a problem depends on."""
    parts: Any = (prompt.golds, worked_text(prompt.row))
    if prompt.tests is not None:
        parts = (asdict(prompt.tests), references(prompt.row))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def worked_text(row: Mapping[str, Any]) -> str | None:
    """Return the worked solution of a maths row whose answer has a column of its own, else None."""
    solution = row.get("solution")
    # Where the answer is taken from the solution, there is nothing to compare.
    own = row.get("answer") is not None or row.get("reward_model") is not None
    return solution if own and isinstance(solution, str) and solution.strip() else None


def references(row: Mapping[str, Any]) -> list[str]:
    """Return the first reference programs of a row, from `solutions`, `solution`, `code` or `canonical_solution`."""
    value = next((row[name] for name in ("solutions", "solution", "code") if row.get(name)), None)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if value is None and isinstance(body := row.get("canonical_solution"), str):
        start = row.get("prompt")
        value = f"{start if isinstance(start, str) else ''}{body}"
    found = value if isinstance(value, list | tuple) else [value]
    return [text for text in found if isinstance(text, str) and text.strip()][:MOST_REFERENCES]


@contextmanager
def _open_checks(prompts: Sequence[Prompt], workers: int) -> Iterator[Check]:
    """Start the processes that the problems need, and yield the check of one problem."""
    from or1.reward import make_scorer
    from or1.reward.pool import WorkerPool
    from or1.reward.scorers import MATH_MEMORY_BYTES

    with ExitStack() as stack:
        maths = programs = None
        if any(prompt.tests is None for prompt in prompts):
            maths = WorkerPool(
                "or1.reward.math:gold_job",
                workers=workers,
                memory_limit_bytes=MATH_MEMORY_BYTES,
                plain_environment=True,
            )
            stack.callback(maths.close)
        if any(prompt.tests is not None and references(prompt.row) for prompt in prompts):
            programs = stack.enter_context(make_scorer(RewardConfig(kind="code", workers=workers)))

        def ask(job: dict[str, Any], name: str, otherwise: str) -> str | None:
            assert maths is not None
            score = maths.submit(job, TIMEOUT_S, name).result()
            return None if score.status is Status.OK else _FAULTS.get(score.status, otherwise)

        def check_gold(prompt: Prompt) -> str:
            job: dict[str, Any] = {"golds": list(prompt.golds)}
            if fault := ask(job, prompt.id, "unparsable"):
                return fault
            if (text := worked_text(prompt.row)) is None:
                return OK
            return ask({**job, "text": text}, prompt.id, "answer_differs") or MATCHED

        def check_program(prompt: Prompt) -> str:
            first = NO_REFERENCE
            for text in references(prompt.row):
                assert programs is not None
                status = programs.submit(prompt, _answer(text)).result().status
                if status is Status.OK:
                    return OK
                if first == NO_REFERENCE:
                    first = f"reference_{_FAULTS.get(status, 'wrong')}"
            return first

        yield lambda prompt: check_gold(prompt) if prompt.tests is None else check_program(prompt)


def _answer(program: str) -> Response:
    text = program if "```" in program else f"```python\n{program}\n```"
    return Response(np.empty(0, np.int32), np.empty(0, np.float32), "stop", 0, text)
