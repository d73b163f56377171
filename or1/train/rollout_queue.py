"""The queue of rollouts: new groups, groups that an earlier step left open, and rollouts made ahead of their step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

from or1.config import Config
from or1.core import codec
from or1.core.display import Display
from or1.core.errors import RunError
from or1.core.seeds import seed_of
from or1.core.types import OpenGroup, Prompt
from or1.data import Sampler
from or1.dist.world import SINGLE, World
from or1.magic.selection import select
from or1.magic.stages import Step
from or1.reward.scorer import Scorer
from or1.rollout.collect import Progress, Rollout, RolloutInterrupted
from or1.rollout.engine import Engine, Sampling
from or1.run.in_flight import Begun
from or1.run.state import TrainState
from or1.train.making import Making
from or1.train.source_metrics import Sources

_POLL_S = 0.5
"""Seconds between two looks at a rollout that a step waits for."""


class Stopped(Exception):
    """The run ended while the next rollout was being made."""


class RolloutQueue:
    """The rollouts of a run in step order.

    The queue advances `state.sampler` and keeps `state.in_flight`, so a checkpoint after `settle` is complete.

    k = rollout.max_staleness is the largest number of policies between the one that samples a token and the one that
    trains on it. The rollout of step n + k is started once the engine has the weights of n - 1 updates, not before.

        k = 0   the rollout of a step is made in the step
        k = 1   (rollout.overlap) the rollout of step n + 1 is made while step n trains: take(n), start_next(n), train,
                settle(), push. So the engine never generates while it receives weights, and the result does not depend
                on time
        k >= 2  the rollouts of steps n to n + k are in the making or ready. A push takes place while the engine
                generates: every response continues under the new weights

    prompts  of data.train, in file order
    scorer   grades every response as it arrives
    stop     returns True once the run was asked to stop; a rollout then ends early
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
        stop: Callable[[], bool] = bool,
    ):
        self.prompts, self.sources = prompts, Sources(prompts)
        self._config, self._sampler, self._scorer = config, sampler, scorer
        self._engine, self._state, self._display, self._world = engine, state, display, world
        self._ahead = config.rollout.steps_ahead
        self._pool = ThreadPoolExecutor(self._ahead + 1, thread_name_prefix="or1-ahead")
        self._making: dict[int, Making] = {}
        self._stop, self._run_stops = threading.Event(), stop
        if self._ahead > 1:
            state.in_flight.making = self._begun

    def take(self, step: Step) -> Rollout:
        """Return the rollout of a step, with new groups in place of rejected ones (loss.refill_rounds). Collective.

        Raises RolloutInterrupted on all ranks if a stop was requested before the rollout was complete. The groups so
        far are in `state.in_flight`, so that a resumed run makes the same rollout from them.
        """
        self._drop_solved(step)
        progress = self._display.progress("rollout")
        first, loss = self._first(step, progress), self._config.in_stage(step.stage_index).loss
        rollout, sampler = first, self._state.sampler
        self._require_bound(rollout, step)
        for attempt in range(1, loss.refill_rounds + 1):
            missing = step.stage.prompts_per_step
            missing -= len(select(rollout.groups, loss, self._config.reward, step.stage).kept)
            if missing <= 0:
                break
            refill = self._refill(step, attempt, missing, progress)
            if refill.interrupted:
                # The resumed step draws the same prompts again for its refills.
                self._state.sampler = sampler
                self._state.in_flight.carried = [OpenGroup(g.prompt, g.responses, g.scores) for g in first.groups]
                raise RolloutInterrupted
            rollout = rollout.plus(refill)
        return rollout

    def skip(self, step: Step) -> None:
        """Take the prompts of a step whose rollout the caller has."""
        self._drop_solved(step)
        self._next_work(step)
        if self._config.rollout.partial_tokens is None:
            # Those of a stop in a rollout, all of which belong to this step.
            self._state.in_flight.carried = []

    def start_next(self, step: Step) -> None:
        """Start to make the rollout after `step`, if there is a next step. With k = 0, let the engine rest.

        The first rollout of a stage waits for its stage: before `step` is over, its limit, its prompts and the solved
        prompts are not known.
        """
        stages = self._state.stages
        if not self._ahead:
            self._engine.release()
        elif self._ahead == 1 and not stages.may_end(step.number) and stages.steps_left(step.number):
            self._start(stages.step(step.number + 1))

    def settle(self) -> None:
        """Wait for the rollout that `start_next` started. Raises the error that ended a rollout. Collective.

        With k >= 2 nothing waits: the rollouts continue under the next weights.
        """
        if self._ahead > 1:
            for making in self._making.values():
                making.require_success()
            return
        while self._making:
            _, making = self._making.popitem()
            # In this thread: collectives of two threads would be called in different orders on different ranks.
            ahead = self._result(making)
            # An interrupted rollout is completed by the resumed run, at the start of the next step.
            self._state.in_flight.ahead = None if ahead.interrupted else ahead
            self._state.in_flight.carried = list(ahead.open)

    def close(self) -> None:
        """Abort the rollout that is being made."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check_stop(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Stopped

    def _first(self, step: Step, progress: Progress) -> Rollout:
        """Return the rollout that was made ahead, or a new one."""
        in_flight = self._state.in_flight
        if self._ahead > 1:
            return self._awaited(step, progress)
        if in_flight.ahead is not None:
            rollout, in_flight.ahead = in_flight.ahead, None
            # Its generation time was already counted in the previous step.
            return replace(rollout, generate_s=0.0, reward_s=0.0, idle_s=0.0)
        rollout = self._made_here(Making(step, *self._next_work(step)), progress)
        in_flight.carried = list(rollout.open)
        if rollout.interrupted:
            raise RolloutInterrupted
        return rollout

    def _awaited(self, step: Step, progress: Progress) -> Rollout:
        """Start the rollouts up to k steps after `step`, and wait for that of `step`. Collective."""
        stages, began = self._state.stages, time.perf_counter()
        for number in range(step.number, step.number + self._ahead + 1):
            before = number - 1
            if before >= step.number and (stages.may_end(before, step.number - 1) or not stages.steps_left(before)):
                break
            if number not in self._making:
                self._start(stages.step(number))
        making = self._making[step.number]
        while making.future is not None and not making.future.done() and not self._run_stops():
            progress(making.finished, max(making.total, 1))
            for other in self._making.values():
                other.require_success()
            wait([making.future], timeout=_POLL_S)
        if self._world.any(making.future is not None and not making.future.done()):
            # A checkpoint holds what all rollouts in the making have so far (`_begun`).
            raise RolloutInterrupted
        rollout = self._result(self._making.pop(step.number))
        return replace(rollout, generate_s=time.perf_counter() - began, reward_s=0.0)

    def _start(self, step: Step) -> None:
        """Start to make the rollout of a step in a thread, or to continue it after a resume."""
        begun = self._state.in_flight.take_begun(step.number)
        if begun is not None and begun.stage_index != step.stage_index:
            self._display.message(
                f"what was begun for step {step.number} is dropped: its stage was {begun.stage_index + 1} and is now "
                f"{step.stage_index + 1}"
            )
            begun = None
        if begun is None:
            making = Making(step, *self._next_work(step))
        else:
            # Not the step's seed, whose random numbers the tokens so far have used.
            seed = seed_of(step.seed, self._state.policy_version)
            making = Making(step, begun.groups, self._sampling(step, seed))
        parts = self._world, self._engine, self._scorer
        # A copy: the lengths must be the same on all ranks, and this step adds its own to them meanwhile.
        making.future = self._pool.submit(making.share, *parts, self._check_stop, self._state.lengths.copy())
        self._making[step.number] = making

    def _result(self, making: Making) -> Rollout:
        """Return the whole rollout that a thread makes. Collective."""
        assert making.future is not None
        return making.whole(self._world, making.future.result())

    def _made_here(self, making: Making, progress: Progress) -> Rollout:
        """Return the whole rollout, made in this thread. Collective."""
        share = making.share(self._world, self._engine, self._scorer, progress, self._state.lengths)
        return making.whole(self._world, share)

    def _begun(self) -> list[Begun]:
        """Return the rollouts in the making, for a checkpoint. Collective."""
        making = [self._making[number] for number in sorted(self._making)]
        mine = codec.dumps([each.parts() for each in making])
        ranks = [codec.loads(data) for data in self._world.gather(mine)]
        version = self._state.policy_version
        found = [each.begun((p for rank in ranks for p in rank[i]), version) for i, each in enumerate(making)]
        # A run that resumed and stopped again before it took up everything.
        return sorted([*found, *self._state.in_flight.begun], key=lambda each: each.number)

    def _require_bound(self, rollout: Rollout, step: Step) -> None:
        """Raise RunError if a token is older than k versions. A rollout that starts in time has none."""
        if self._config.rollout.partial_tokens is not None:
            return  # Then a response gets older with every step that carries it on.
        oldest = self._state.policy_version - self._ahead
        found = [int(r.token_versions.min()) for g in rollout.groups for r in g.responses if len(r.token_ids)]
        if found and min(found) < oldest:
            raise RunError(
                f"step {step.number} would train on tokens of policy {min(found)}, but rollout.max_staleness = "
                f"{self._ahead} allows {oldest} and later; resume from an earlier checkpoint and report this"
            )

    def _refill(self, step: Step, attempt: int, count: int, progress: Progress) -> Rollout:
        sampling = self._sampling(step, seed_of(self._config.seed, step.number, attempt))
        return self._made_here(Making(step, self._fresh(count), sampling), progress)

    def _drop_solved(self, step: Step) -> None:
        """Report how many solved prompts the stage of `step` drops, at its start (only with data.drop_solved)."""
        if dropped := self._state.solved.enter(step.stage_index):
            total = len(self.prompts)
            self._display.message(
                f"{dropped} prompts that the stage before always solved are dropped; "
                f"{total - len(self._state.solved.dropped)} of {total} are left"
            )

    def _next_work(self, step: Step) -> tuple[list[OpenGroup | Prompt], Sampling]:
        """Choose what to generate for a step. In the trainer's thread, which owns the sampler's state."""
        carried = self._state.in_flight.carried
        prompts = self._fresh(max(step.stage.prompts_per_step - len(carried), 0))
        return [*carried, *prompts], self._sampling(step, step.seed)

    def _fresh(self, count: int) -> list[Prompt]:
        if not count:
            return []
        solved_N = self._state.solved.mask(self.prompts)
        chosen, self._state.sampler = self._sampler.take(self._state.sampler, count, solved_N)
        return [self.prompts[i] for i in chosen]

    def _sampling(self, step: Step, seed: int) -> Sampling:
        rollout, stage = self._config.in_stage(step.stage_index).rollout, step.stage
        return Sampling(
            rollout.temperature,
            stage.max_response_tokens,
            stage.group_size,
            seed,
            new_tokens=rollout.partial_tokens,
            deadline_s=rollout.deadline_s,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            # With k >= 2 the rollouts go on until the checkpoint is written.
            stop=self._run_stops if self._ahead < 2 else bool,
        )
