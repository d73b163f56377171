"""The queue of rollouts: new groups, groups that an earlier step left open, and the rollout made during training."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from or1.config import Config, StageConfig
from or1.core.display import Display
from or1.core.seeds import seed_of
from or1.core.types import OpenGroup, Prompt
from or1.data import Sampler
from or1.dist.world import SINGLE, World
from or1.magic.selection import select
from or1.magic.stages import Step
from or1.reward.scorer import Scorer
from or1.rollout.across_ranks import collect_share, exchange
from or1.rollout.collect import Progress, Rollout
from or1.rollout.dealing import ResponseLengths
from or1.rollout.engine import Engine, Sampling
from or1.run.state import TrainState

Work = tuple[list[Prompt], list[OpenGroup]]


class Stopped(Exception):
    """The run ended while the next rollout was being made."""


class RolloutQueue:
    """The rollouts of a run in step order.

    The queue advances `state.sampler` and keeps `state.in_flight`, so a checkpoint after `settle` is complete.

    With `rollout.overlap` the rollout of step k + 1 is made while step k trains: take(k), start_next(k), train,
    settle(), push the weights. So the engine never generates while it receives weights, and a rollout is one policy
    old when it is trained.

    prompts  of data.train, in file order
    scorer   grades every response as it arrives
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        engine: Engine,
        scorer: Scorer,
        state: TrainState,
        display: Display,
        *,
        sampler: Sampler,
        world: World = SINGLE,
    ):
        self.prompts = prompts
        self._config, self._sampler, self._scorer = config, sampler, scorer
        self._engine, self._state, self._display, self._world = engine, state, display, world
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="or1-ahead")
        self._making: Future[Rollout] | None = None
        self._work: Work = ([], [])
        self._stop = threading.Event()

    def take(self, step: Step) -> Rollout:
        """Return the rollout of a step, with new groups in place of rejected ones (loss.refill_rounds). Collective."""
        self._drop_solved(step)
        progress = self._display.progress("rollout")
        rollout, loss = self._first(step, progress), self._config.loss
        for attempt in range(1, loss.refill_rounds + 1):
            missing = step.stage.prompts_per_step
            missing -= len(select(rollout.groups, loss, self._config.reward, step.stage).kept)
            if missing <= 0:
                break
            rollout = rollout.plus(self._refill(step, attempt, missing, progress))
        return rollout

    def skip(self, step: Step) -> None:
        """Take the prompts of a step whose rollout the caller has."""
        self._drop_solved(step)
        self._next_work(step)

    def start_next(self, step: Step) -> None:
        """Start to make the rollout after `step`, if there is a next step. Without overlap, let the engine rest.

        The first rollout of a stage waits for its stage: before `step` is over, its limit, its prompts and the solved
        prompts are not known.
        """
        stages = self._state.stages
        if not self._config.rollout.overlap:
            self._engine.release()
            return
        if not stages.may_end(step.number) and stages.steps_left(step.number):
            prompts, sampling, carried = self._next_work(stages.step(step.number + 1))
            self._work = prompts, carried
            # A copy: the lengths must be the same on all ranks, and this step adds its own to them meanwhile.
            lengths = self._state.lengths.copy()
            self._making = self._pool.submit(self._make, prompts, sampling, carried, self._check_stop, lengths)

    def settle(self) -> None:
        """Wait for the rollout that `start_next` started. Raises the error that ended it. Collective."""
        if self._making is not None:
            making, self._making = self._making, None
            # In this thread: collectives of two threads would be called in different orders on different ranks.
            self._state.in_flight.ahead = exchange(self._world, making.result(), *self._work)
            self._state.in_flight.carried = list(self._state.in_flight.ahead.open)

    def close(self) -> None:
        """Abort the rollout that is being made."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check_stop(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Stopped

    def _first(self, step: Step, progress: Progress) -> Rollout:
        """Return the rollout that was made during the step before, or a new one."""
        in_flight = self._state.in_flight
        if in_flight.ahead is not None:
            rollout, in_flight.ahead = in_flight.ahead, None
            # Its generation time was already counted in the previous step.
            return replace(rollout, generate_s=0.0, reward_s=0.0, idle_s=0.0)
        prompts, sampling, carried = self._next_work(step)
        rollout = exchange(self._world, self._make(prompts, sampling, carried, progress), prompts, carried)
        in_flight.carried = list(rollout.open)
        return rollout

    def _refill(self, step: Step, attempt: int, count: int, progress: Progress) -> Rollout:
        prompts = self._fresh(count)
        sampling = self._sampling(step.stage, seed_of(self._config.seed, step.number, attempt))
        return exchange(self._world, self._make(prompts, sampling, [], progress), prompts, [])

    def _drop_solved(self, step: Step) -> None:
        """Report how many solved prompts the stage of `step` drops, at its start (only with data.drop_solved)."""
        if dropped := self._state.solved.enter(step.stage_index):
            total = len(self.prompts)
            self._display.message(
                f"{dropped} prompts that the stage before always solved are dropped; "
                f"{total - len(self._state.solved.dropped)} of {total} are left"
            )

    def _next_work(self, step: Step) -> tuple[list[Prompt], Sampling, list[OpenGroup]]:
        """Choose what to generate for a step. In the trainer's thread, which owns the sampler's state."""
        carried = self._state.in_flight.carried
        prompts = self._fresh(max(step.stage.prompts_per_step - len(carried), 0))
        return prompts, self._sampling(step.stage, step.seed), carried

    def _fresh(self, count: int) -> list[Prompt]:
        if not count:
            return []
        solved_N = self._state.solved.mask(self.prompts)
        chosen, self._state.sampler = self._sampler.take(self._state.sampler, count, solved_N)
        return [self.prompts[i] for i in chosen]

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
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        carried: list[OpenGroup],
        progress: Progress,
        lengths: ResponseLengths | None = None,
    ) -> Rollout:
        """Generate this rank's share."""
        return collect_share(
            self._world,
            self._engine,
            self._scorer,
            prompts,
            sampling,
            carried=carried,
            progress=progress,
            lengths=self._state.lengths if lengths is None else lengths,
        )
