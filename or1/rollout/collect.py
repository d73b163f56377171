"""Responses and their scores, gathered into groups while the engine goes on generating."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from or1.reward.base import Scorer
from or1.rollout.base import Engine, Sampling
from or1.types import Group, Prompt, Response, Score

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Rollout:
    """Groups in prompt order. generate_s: seconds of generation. reward_s: seconds of scoring not hidden behind it."""

    groups: list[Group]
    generate_s: float
    reward_s: float


def collect(
    engine: Engine, scorer: Scorer, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress = no_progress
) -> Rollout:
    """Generate `sampling.samples` responses to every prompt, scoring each as it finishes."""
    began = time.perf_counter()
    total = len(prompts) * sampling.samples
    finished: dict[tuple[int, int], tuple[Response, Future[Score]]] = {}
    for p, s, response in engine.generate(prompts, sampling):
        finished[p, s] = response, scorer.submit(prompts[p], response)
        progress(len(finished), total)
    generated = time.perf_counter()
    groups = []
    for p, prompt in enumerate(prompts):
        members = [finished[p, s] for s in range(sampling.samples)]
        groups.append(Group(prompt, tuple(r for r, _ in members), tuple(score.result() for _, score in members)))
    return Rollout(groups, generated - began, time.perf_counter() - generated)
