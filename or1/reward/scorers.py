"""The scorers a run can choose: mathematics, code, either by data row, or a function of the user's own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Self

from or1.core.errors import ScorerError
from or1.core.types import Prompt, Response, Score, Status
from or1.reward import math
from or1.reward.code.extract import last_python_block
from or1.reward.code.grade import CodeSettings
from or1.reward.code.sandbox import START_LIMIT_S
from or1.reward.columns import check_columns
from or1.reward.output import LOG_NAME
from or1.reward.pool import WorkerPool, done
from or1.reward.scorer import Scorer

MATH_MEMORY_BYTES = 2 << 30
"""Address space of a process that grades mathematics."""
_SHOWN = 80
"""Characters of an answer's beginning and of its end in a report of a crash."""


class _PoolScorer:
    """A scorer on a WorkerPool of its own."""

    _pool: WorkerPool

    def close(self) -> None:
        """See `Scorer.close`."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MathScorer(_PoolScorer):
    r"""The math verifier as a `Scorer`.

    Responses without \boxed{} and answers that string or integer comparison decides are scored in the caller; the
    others go to the workers, equal ones once.

    workers              processes
    timeout_s            limit for one answer from the moment its grading starts; then Status.TIMEOUT
    require_think_close  a response without `</think>` is Status.TRUNCATED
    grade_truncated      grade a response that was cut like any other; else it is Status.TRUNCATED
    grader, memo_size    as for WorkerPool; a job is {"box", "golds"}
    log                  as for WorkerPool

    Raises ScorerError if a worker cannot start.
    """

    def __init__(
        self,
        *,
        workers: int,
        timeout_s: float,
        require_think_close: bool = False,
        grade_truncated: bool = False,
        grader: str = "or1.reward.math:equivalent_job",
        memo_size: int = 100_000,
        log: str | os.PathLike[str] | None = None,
    ):
        self._timeout_s, self._require_think_close = timeout_s, require_think_close
        self._grade_truncated = grade_truncated
        self._pool = WorkerPool(
            grader,
            workers=workers,
            memory_limit_bytes=MATH_MEMORY_BYTES,
            memo_size=memo_size,
            log=log,
            plain_environment=True,
        )

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """See `Scorer.submit`. Raises RuntimeError after `close`."""
        if response.truncated and not self._grade_truncated:
            return done(math.make_score(Status.TRUNCATED))
        found = math.screen(response.text, prompt.golds, require_think_close=self._require_think_close)
        if isinstance(found, Score):
            return done(found)
        job = {"box": found, "golds": prompt.golds}
        return self._pool.submit(job, self._timeout_s, _name(prompt, f"\\boxed{{{found}}}"))


class CodeScorer(_PoolScorer):
    """Programs against their tests, each in a sandbox; see `or1.reward.code`.

    workers              programs that run at once
    settings             limits; `settings.sandbox` is what `find_sandbox` returned
    require_think_close  a response without `</think>` is Status.TRUNCATED
    grade_truncated      grade a response that was cut like any other; else it is Status.TRUNCATED
    log                  as for WorkerPool

    Raises ScorerError if a worker cannot start.
    """

    def __init__(
        self,
        *,
        workers: int,
        settings: CodeSettings,
        require_think_close: bool = False,
        grade_truncated: bool = False,
        log: str | os.PathLike[str] | None = None,
    ):
        self._settings, self._require_think_close = settings, require_think_close
        self._grade_truncated = grade_truncated
        self._pool = WorkerPool("or1.reward.code.grade:grade_job", workers=workers, log=log)

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """See `Scorer.submit`. Raises RuntimeError after `close`."""
        answer = math.answer_part(response.text)
        cut = response.truncated and not self._grade_truncated
        if cut or (answer is None and self._require_think_close):
            return done(math.make_score(Status.TRUNCATED))
        program = last_python_block(response.text if answer is None else answer)
        if program is None:
            return done(math.make_score(Status.NO_ANSWER))
        tests = asdict(prompt.tests) if prompt.tests is not None else {}
        count = max(len(prompt.tests.inputs), prompt.tests.script.count("assert")) if prompt.tests else 1
        job = {"program": program, "tests": tests, "settings": asdict(self._settings)}
        # The grader keeps the limits itself; this one is for a grader that cannot.
        return self._pool.submit(job, self._settings.total_s(count) + 3 * START_LIMIT_S, _name(prompt, program))


class CustomScorer(_PoolScorer):
    """A function of the user's own, in any of the signatures that `or1.reward.custom` recognises.

    path             "module:function" or "path/file.py:function"
    workers          processes, each with the function loaded
    timeout_s        limit for one response; then Status.TIMEOUT
    grade_truncated  False: a response that was cut is Status.TRUNCATED, 0, without a call
    memory_bytes     that one process can fill; 0 is no limit
    prompts          what will be scored: their rows must have what the function needs
    log              as for WorkerPool

    None from the function is Status.SKIPPED, an exception Status.CRASH; like a timeout these have no reward, so the
    response is left out instead of being taught as wrong. `remarks` are warnings for a person. Raises
    RewardFunctionError if the function cannot be loaded, its signature is not recognised, or no row has a column that
    it needs.
    """

    def __init__(
        self,
        path: str,
        *,
        workers: int,
        timeout_s: float,
        grade_truncated: bool = True,
        memory_bytes: int = 0,
        prompts: Iterable[Prompt] = (),
        log: str | os.PathLike[str] | None = None,
    ):
        self._timeout_s, self._grade_truncated = timeout_s, grade_truncated
        self._pool = WorkerPool(
            "or1.reward.custom:grade_job",
            workers=workers,
            options={"path": path},
            unscored_faults=True,
            log=log,
            memory_limit_bytes=memory_bytes,
            memory_kind="DATA",
        )
        try:
            self.remarks = check_columns(self._pool.about, prompts)
        except ScorerError:
            self.close()
            raise

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """See `Scorer.submit`."""
        if response.truncated and not self._grade_truncated:
            return done(math.make_score(Status.TRUNCATED))
        job = {
            "row": dict(prompt.row),
            "source": prompt.source,
            "prompt": prompt.text,
            "prompt_ids": prompt.token_ids.tolist(),
            "golds": list(prompt.golds),
            "completion": response.text,
            "completion_ids": response.token_ids.tolist(),
        }
        return self._pool.submit(job, self._timeout_s, _name(prompt, response.text))


class AutoScorer:
    """Mathematics or code, by what each prompt carries. `makers` make the two scorers, "math" and "code", when needed.

    needs  those to start at once, so that a machine that cannot run them says so before training
    """

    def __init__(self, makers: Mapping[str, Callable[[], Scorer]], needs: frozenset[str] = frozenset()):
        self._makers, self._lock, self._scorers = makers, threading.Lock(), {}
        try:
            for kind in sorted(needs):
                self._scorer(kind)
        except ValueError:
            self.close()
            raise

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """See `Scorer.submit`. Raises ScorerError if the first prompt of a kind finds that it cannot be scored."""
        return self._scorer(kind_of(prompt)).submit(prompt, response)

    def close(self) -> None:
        """See `Scorer.close`."""
        for scorer in self._scorers.values():
            scorer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scorer(self, kind: str) -> Scorer:
        with self._lock:
            if kind not in self._scorers:
                self._scorers[kind] = self._makers[kind]()
            return self._scorers[kind]


def _name(prompt: Prompt, answer: str) -> str:
    """What a person needs to find a response again: its prompt, and how it begins and ends."""
    shown = answer if len(answer) <= 2 * _SHOWN else f"{answer[:_SHOWN]} ... {answer[-_SHOWN:]}"
    return f"{prompt.id} {shown!r}"


def remarks_of(scorer: Scorer, folder: Path) -> list[str]:
    """Return what a person should know of a function of their own: its warnings, and where its prints go."""
    if not isinstance(scorer, CustomScorer):
        return []
    return [*scorer.remarks, f"what the reward function prints goes to {folder / LOG_NAME}"]


def kind_of(prompt: Prompt) -> str:
    """The verifier of a prompt: "code" if it carries tests, else "math"."""
    return "code" if prompt.tests is not None else "math"
