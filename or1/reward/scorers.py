"""The scorers that `reward.kind` selects: maths, code, both by data row, or a user-defined function."""

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
from or1.reward.pool import WorkerPool
from or1.reward.scorer import Scorer, scored

MATH_MEMORY_BYTES = 2 << 30
"""Limit for the address space of a process that grades maths."""
_SHOWN = 80
"""Characters of an answer's start and of its end in the log of a crash."""


class _PoolScorer:
    """The parts that all scorers with one WorkerPool share."""

    def __init__(self, pool: WorkerPool):
        self._pool = pool

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MathScorer(_PoolScorer):
    r"""The maths verifier as a `Scorer`.

    `submit` itself scores responses without \boxed{} and answers that a string or integer comparison decides. All
    other answers go to the workers, equal ones once.

    workers              number of processes
    timeout_s            limit in seconds for one answer, from the start of its grading; then Status.TIMEOUT
    require_think_close  score a response without `</think>` as Status.TRUNCATED
    grade_truncated      grade a truncated response like any other instead of scoring it as Status.TRUNCATED
    grader, memo_size    see WorkerPool; a job is {"box", "golds"}
    log                  see WorkerPool

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
        super().__init__(
            WorkerPool(
                grader,
                workers=workers,
                memory_limit_bytes=MATH_MEMORY_BYTES,
                memo_size=memo_size,
                log=log,
                plain_environment=True,
            )
        )
        self._timeout_s, self._require_think_close = timeout_s, require_think_close
        self._grade_truncated = grade_truncated

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Start to score one response (see `Scorer`). Raises RuntimeError after `close`."""
        if response.truncated and not self._grade_truncated:
            return scored(math.make_score(Status.TRUNCATED))
        found = math.screen(response.text, prompt.golds, require_think_close=self._require_think_close)
        if isinstance(found, Score):
            return scored(found)
        job = {"box": found, "golds": prompt.golds}
        return self._pool.submit(job, self._timeout_s, _name(prompt, f"\\boxed{{{found}}}"))


class CodeScorer(_PoolScorer):
    """The code verifier as a `Scorer`: it runs each program against its tests in a sandbox; see `or1.reward.code`.

    workers              number of processes, each of which runs one program at a time
    settings             limits; `settings.sandbox` is a result of `find_sandbox`
    require_think_close  score a response without `</think>` as Status.TRUNCATED
    grade_truncated      grade a truncated response like any other instead of scoring it as Status.TRUNCATED
    log                  see WorkerPool

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
        super().__init__(WorkerPool("or1.reward.code.grade:grade_job", workers=workers, log=log))
        self._settings, self._require_think_close = settings, require_think_close
        self._grade_truncated = grade_truncated

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Start to score one response (see `Scorer`). Raises RuntimeError after `close`."""
        answer = math.answer_part(response.text)
        truncated = response.truncated and not self._grade_truncated
        if truncated or (answer is None and self._require_think_close):
            return scored(math.make_score(Status.TRUNCATED))
        program = last_python_block(response.text if answer is None else answer)
        if program is None:
            return scored(math.make_score(Status.NO_ANSWER))
        tests = asdict(prompt.tests) if prompt.tests is not None else {}
        count = max(len(prompt.tests.inputs), prompt.tests.script.count("assert")) if prompt.tests else 1
        job = {"program": program, "tests": tests, "settings": asdict(self._settings)}
        # The grader enforces its own limits. This larger limit is for a grader that hangs.
        return self._pool.submit(job, self._settings.total_s(count) + 3 * START_LIMIT_S, _name(prompt, program))


class CustomScorer(_PoolScorer):
    """A user-defined reward function, with any signature that `or1.reward.custom` recognises, as a `Scorer`.

    path             "module:function" or "path/file.py:function"
    workers          number of processes, each with the function loaded
    timeout_s        limit in seconds for one response; then Status.TIMEOUT
    grade_truncated  False: score a truncated response as Status.TRUNCATED, reward 0, without a call of the function
    memory_bytes     limit for the memory of one process; 0: no limit
    prompts          prompts of the run; their rows must have the columns that the function requires
    log              see WorkerPool

    A result of None gives Status.SKIPPED, an exception Status.CRASH. These and Status.TIMEOUT carry no reward, so that
    the response is excluded from training instead of being trained as wrong. `remarks` are warnings for the user.

    Raises RewardFunctionError if the function cannot be loaded, has an unknown signature, or requires a column that no
    row has.
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
        super().__init__(
            WorkerPool(
                "or1.reward.custom:grade_job",
                workers=workers,
                options={"path": path},
                unscored_faults=True,
                log=log,
                memory_limit_bytes=memory_bytes,
                memory_kind="DATA",
            )
        )
        self._timeout_s, self._grade_truncated = timeout_s, grade_truncated
        try:
            self.remarks = check_columns(self._pool.about, prompts)
        except ScorerError:
            self.close()
            raise

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Start to score one response (see `Scorer`). Raises RuntimeError after `close`."""
        if response.truncated and not self._grade_truncated:
            return scored(math.make_score(Status.TRUNCATED))
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
    """Maths or code, as each prompt requires (`kind_of`). Each of the two scorers starts when it is first needed.

    makers  "math" and "code": functions that start the scorer
    needs   kinds to start immediately, so that a machine that cannot run one fails before training
    """

    def __init__(self, makers: Mapping[str, Callable[[], Scorer]], needs: frozenset[str] = frozenset()):
        self._makers, self._lock = makers, threading.Lock()
        self._scorers: dict[str, Scorer] = {}
        try:
            for kind in sorted(needs):
                self._scorer(kind)
        except ValueError:
            self.close()
            raise

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Start to score one response (see `Scorer`). Raises ScorerError if the first scorer of a kind cannot start."""
        return self._scorer(kind_of(prompt)).submit(prompt, response)

    def close(self) -> None:
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
    """Return a name that identifies a response in a log: its prompt's id, and the start and the end of its text."""
    shown = answer if len(answer) <= 2 * _SHOWN else f"{answer[:_SHOWN]} ... {answer[-_SHOWN:]}"
    return f"{prompt.id} {shown!r}"


def remarks_of(scorer: Scorer, folder: Path) -> list[str]:
    """Return the warnings about a user-defined function and the place of its log; empty for other scorers."""
    if not isinstance(scorer, CustomScorer):
        return []
    return [*scorer.remarks, f"what the reward function prints goes to {folder / LOG_NAME}"]


def kind_of(prompt: Prompt) -> str:
    """Return the verifier of a prompt: "code" if the prompt has tests, else "math"."""
    return "code" if prompt.tests is not None else "math"
