"""What a step trains on: new groups, groups left open by the last step, or a rollout made while that one trained."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from or1.config import Config, StageConfig
from or1.core.seeds import seed_of
from or1.core.types import OpenGroup, Prompt
from or1.data import Sampler
from or1.dist.world import SINGLE, World
from or1.reward.scorer import Scorer
from or1.rollout.across_ranks import collect_share, exchange
from or1.rollout.collect import Progress, Rollout
from or1.rollout.engine import Engine, Sampling
from or1.run.state import TrainState

Work = tuple[list[Prompt], list[OpenGroup]]


class Stopped(Exception):
    """The run ends while a rollout is being made ahead of it."""


class RolloutFeed:
    """Rollouts in step order. It advances `state.sampler` and keeps `state.in_flight`, so a checkpoint taken after
    `settle` holds everything.

    With `rollout.overlap`, the order of a step is: take(k), ahead(k + 1), train on k, settle(), push the weights; so
    the engine never generates while it is being given weights, and each rollout is one policy old when it is trained.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        engine: Engine,
        state: TrainState,
        world: World = SINGLE,
    ):
        self._config, self._prompts, self._sampler = config, prompts, sampler
        self._engine, self._state, self._world = engine, state, world
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="or1-ahead")
        self._making: Future[Rollout] | None = None
        self._work: Work = ([], [])
        self._stop = threading.Event()

    def take(self, number: int, scorer: Scorer, progress: Progress) -> Rollout:
        """The rollout of step `number`: the one made ahead, or a new one."""
        in_flight = self._state.in_flight
        if in_flight.ahead is not None:
            rollout, in_flight.ahead = in_flight.ahead, None
            # Its time was that of the step before.
            return replace(rollout, generate_s=0.0, reward_s=0.0)
        prompts, sampling, carried = self._next_work(number)
        share = self._make(prompts, sampling, carried, scorer, progress)
        rollout = exchange(self._world, share, prompts, carried)
        in_flight.carried = list(rollout.open)
        return rollout

    def refill(self, number: int, attempt: int, count: int, scorer: Scorer, progress: Progress) -> Rollout:
        """`count` more groups for step `number`, to replace rejected ones; `attempt` counts from 1."""
        _, stage = self._state.stages.at(self._config, number)
        prompts = self._fresh(count)
        sampling = self._sampling(stage, seed_of(self._config.seed, number, attempt))
        return exchange(self._world, self._make(prompts, sampling, [], scorer, progress), prompts, [])

    def skip(self, number: int) -> None:
        """Advance the sampler past step `number`, whose rollout the caller has."""
        self._next_work(number)

    def ahead(self, number: int, scorer: Scorer) -> None:
        """Start making the rollout of step `number`, if overlap is on and there is such a step.

        The first one of a stage waits for its stage: until the step before is over, neither its limit and prompts nor
        which of them are solved is known.
        """
        stages = self._state.stages
        if not self._config.rollout.overlap or stages.may_end(self._config, number - 1):
            return
        if stages.steps_left(self._config, number - 1):
            prompts, sampling, carried = self._next_work(number)
            self._work = prompts, carried
            self._making = self._pool.submit(self._make, prompts, sampling, carried, scorer, self._check_stop)

    def settle(self) -> None:
        """Wait for what `ahead` started. Raises what went wrong there."""
        if self._making is not None:
            making, self._making = self._making, None
            # In this thread and not in that one: collectives of two threads would meet in different orders.
            self._state.in_flight.ahead = exchange(self._world, making.result(), *self._work)
            self._state.in_flight.carried = list(self._state.in_flight.ahead.open)

    def close(self) -> None:
        """Give up what is being made."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check_stop(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Stopped

    def _next_work(self, number: int) -> tuple[list[Prompt], Sampling, list[OpenGroup]]:
        """What to generate for a step; decided in the trainer's thread, where the sampler's state lives."""
        _, stage = self._state.stages.at(self._config, number)
        carried = self._state.in_flight.carried
        prompts = self._fresh(max(stage.prompts_per_step - len(carried), 0))
        return prompts, self._sampling(stage, seed_of(self._config.seed, number)), carried

    def _fresh(self, count: int) -> list[Prompt]:
        if not count:
            return []
        solved_N = self._state.solved.mask(self._prompts)
        chosen, self._state.sampler = self._sampler.take(self._state.sampler, count, solved_N)
        return [self._prompts[i] for i in chosen]

    def _sampling(self, stage: StageConfig, seed: int) -> Sampling:
        rollout = self._config.rollout
        return Sampling(
            rollout.temperature,
            stage.max_response_tokens,
            stage.group_size,
            seed,
            new_tokens=rollout.partial_tokens,
            deadline_s=rollout.deadline_s,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )

    def _make(
        self, prompts: list[Prompt], sampling: Sampling, carried: list[OpenGroup], scorer: Scorer, progress: Progress
    ) -> Rollout:
        """This rank's share."""
        return collect_share(self._world, self._engine, scorer, prompts, sampling, carried=carried, progress=progress)
