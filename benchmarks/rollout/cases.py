"""Cases of the simulation: length distributions of a step, numbers of ranks, and ways to deal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.rollout.engine import BATCH_SIZE, SimulatedEngine, least_seconds, run
from or1.core.types import Prompt
from or1.rollout.dealing import Alone, Dealt, Given, Hand, ResponseLengths, first_room, single_units
from or1.rollout.engine import Job, Sampling, Supply, jobs_of

PROMPTS, SAMPLES, LIMIT = 128, 64, 32768
"""Stage 3.5 of OR1-Math-7B: responses of a step, and their limit in tokens."""
WITHIN_CV = 0.5
"""Spread of the responses to one prompt, as their standard deviation over their mean."""
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
MEANS, SPREADS = (8000, 12000, 16000), (0.4, 0.6)
ORDERS = ("static", "demand, lengths unknown", "demand")
FORESEEN = "demand, lengths foreseen"
"""Dealing by the length of each response, which nobody knows before: what better expectations could give."""


@dataclass(frozen=True)
class Step:
    """Lengths of a step, int[P, M], and of the same prompts at their last visit."""

    lengths: np.ndarray
    earlier: np.ndarray

    @classmethod
    def draw(cls, mean: int, spread: float, seed: int, prompts: int = PROMPTS) -> Step:
        """Draw log-normal means of the prompts, and log-normal responses around them, cut at the limit."""
        rng = np.random.default_rng(seed)
        means = _lognormal(rng, np.full(prompts, float(mean)), spread, (prompts,))
        now, before = (_lognormal(rng, means[:, None], WITHIN_CV, (prompts, SAMPLES)) for _ in range(2))
        return cls(*(np.clip(drawn, 1, LIMIT).astype(np.int64) for drawn in (now, before)))


def _lognormal(rng: np.random.Generator, mean: np.ndarray, cv: float, size: tuple[int, ...]) -> np.ndarray:
    width = np.sqrt(np.log1p(cv**2))
    return mean * np.exp(rng.normal(-(width**2) / 2, width, size))


def simulate(step: Step, ranks: int, order: str, speeds: Callable[[int], float] = lambda rank: 1.0) -> dict[str, float]:
    """Return how the ranks fare with one step: seconds, share of the time that a rank is idle, calls of the counter.

    The seconds are until the last response; a rank is idle from the end of its own last one. "least_s" is a bound.
    """
    prompts = [Prompt(str(p), "simulated", "", np.zeros(1, np.int32)) for p in range(len(step.lengths))]
    jobs = list(jobs_of(prompts, Sampling(1.0, LIMIT, SAMPLES, seed=0), None))

    def lengths(job: Job) -> int:
        return int(step.lengths[job.slot])

    supplies: list[Supply]
    if order == "static":
        supplies = [Given([job for job in jobs if job.slot[0] % ranks == rank]) for rank in range(ranks)]
    else:
        known = ResponseLengths()
        if order == "demand":
            known.tokens = {str(p): round(mean) for p, mean in enumerate(step.earlier.mean(1))}
        expected, counter = known.expected(prompts, jobs), Alone()
        if order == FORESEEN:
            expected = [float(lengths(job)) for job in jobs]
        units, tokens = single_units(jobs, expected), {job.slot: e for job, e in zip(jobs, expected, strict=True)}
        room = first_room(BATCH_SIZE)
        supplies = [Dealt(units, Hand(len(units), ranks, rank, room, counter), tokens) for rank in range(ranks)]
    engines = [SimulatedEngine(supply, lengths, speed=speeds(rank)) for rank, supply in enumerate(supplies)]
    run(engines)
    ends = np.array([engine.ended for engine in engines])
    tokens = sum(engine.tokens for engine in engines)
    if tokens != step.lengths.sum():
        raise ValueError(f"{tokens} tokens were generated, but the responses have {step.lengths.sum()}")
    return {
        "seconds": float(ends.max()),
        "least_s": least_seconds(step.lengths, ranks),
        "idle": float(1 - ends.mean() / ends.max()),
        "wait_s": float(ends.max() - ends.min()),
        "calls": float(sum(engine.calls for engine in engines)) if order != "static" else 0.0,
        "preempted": float(sum(engine.preempted for engine in engines)),
    }
