"""The scorer that `[reward]` describes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from or1.core.errors import ScorerError
from or1.reward.capacity import check_workers
from or1.reward.output import LOG_NAME

# The scorers are imported when one is made. `python -m or1.reward.worker` imports this package first, and must not find
# its own module imported already, as part of the pool.
if TYPE_CHECKING:
    from or1.config import RewardConfig
    from or1.core.types import Prompt
    from or1.reward.scorer import Scorer


def make_scorer(config: RewardConfig, prompts: Iterable[Prompt] | None = None, folder: Path | None = None) -> Scorer:
    """Return the scorer of `[reward]`, with its worker processes started and warm.

    prompts  prompts of the run: the verifiers they need start now, so that a missing requirement fails early
    folder   directory of `reward.log`, which gets the output of rewards; None: discard the output

    Raises or1.core.errors.ScorerError if a worker does not start, for example because math-verify is missing. Other
    causes: the machine cannot hold `reward.workers`, no sandbox works for code, the prompts do not fit `reward.kind`.
    """
    prompts = list(prompts or ())
    log = None if folder is None else folder / LOG_NAME
    if not config.parts:
        check_workers(config.workers)
        return _scorer(config, config.kind, prompts, log)
    from or1.reward.parts import Part, PartsScorer

    check_workers(config.workers * len(config.parts))
    with ExitStack() as started:
        scorers = {}
        for part in config.parts:
            scorer = started.enter_context(_scorer(config, part.kind, prompts, log))
            scorers[Part(part.label, part.weight)] = scorer
        started.pop_all()
    return PartsScorer(scorers)


def _scorer(config: RewardConfig, kind: str, prompts: Sequence[Prompt], log: Path | None) -> Scorer:
    from or1.reward.scorers import AutoScorer, CustomScorer, kind_of

    if ":" in kind:
        return CustomScorer(
            kind,
            workers=config.workers,
            timeout_s=config.timeout_s,
            memory_bytes=config.memory_mib << 20,
            grade_truncated=config.grade_truncated is not False,
            prompts=prompts,
            log=log,
        )
    kinds = {kind_of(prompt): prompt.id for prompt in prompts}
    other = {"math": "code", "code": "math"}.get(kind)
    if other in kinds:
        raise ScorerError(
            f'reward.kind = "{kind}", but {kinds[other]} and others are {other} problems; set '
            'reward.kind = "auto", or leave those rows out'
        )
    makers = {"math": partial(_math_scorer, config, log), "code": partial(_code_scorer, config, log)}
    return AutoScorer(makers, frozenset(kinds)) if kind == "auto" else makers[kind]()


def _math_scorer(config: RewardConfig, log: Path | None) -> Scorer:
    from or1.reward.scorers import MathScorer

    return MathScorer(
        workers=config.workers,
        timeout_s=config.timeout_s,
        require_think_close=config.require_think_close,
        grade_truncated=bool(config.grade_truncated),
        log=log,
    )


def _code_scorer(config: RewardConfig, log: Path | None) -> Scorer:
    from or1.reward.code.grade import CodeSettings
    from or1.reward.code.sandbox import find_sandbox
    from or1.reward.scorers import CodeScorer

    options = config.code.model_dump()
    settings = CodeSettings(**options | {"sandbox": find_sandbox(config.code.sandbox)})
    return CodeScorer(
        workers=config.workers,
        settings=settings,
        require_think_close=config.require_think_close,
        grade_truncated=bool(config.grade_truncated),
        log=log,
    )
