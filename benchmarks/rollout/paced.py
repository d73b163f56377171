"""Two real ranks, one with a slow engine: the dealing of `or1.rollout.across_ranks`, with delays for a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import torch

from or1.config import DistConfig
from or1.core.types import Prompt, Response, Score, Status
from or1.dist.world import World, join
from or1.rollout.across_ranks import collect_share, exchange
from or1.rollout.collect import Rollout
from or1.rollout.dealing import Dealt, Given, ResponseLengths, Window
from or1.rollout.engine import Engine, Finished, Job, Sampling, Slot, Supply, continued, jobs_of

PROMPTS, SAMPLES, LIMIT = 12, 4, 200


class PacedEngine:
    """Random tokens, a batch at a time, each step of the batch with a delay. It takes jobs as responses end.

    step_s  seconds of a step
    """

    shares_weights, continuous_batching, ranks_per_model = False, True, 1

    def __init__(self, step_s: float, batch_size: int = 4):
        self.version, self.batch_size, self._step_s = 0, batch_size, step_s

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield responses, as `Engine.generate`."""
        yield from self.generate_from(Given(jobs_of(prompts, sampling, slots)), sampling)

    def generate_from(self, supply: Supply, sampling: Sampling) -> Iterator[Finished]:
        """Yield responses, as `TakingEngine.generate_from`."""
        window = Window(self.batch_size, shared=isinstance(supply, Dealt))
        running: list[tuple[Job, int, int]] = []
        done, more = 0, True
        while more or running:
            while more and (room := window.room(len(running), 0)):
                jobs = supply.take(room)
                more = bool(jobs)
                running += [(job, done, tokens_of(job)) for job in jobs]
            time.sleep(self._step_s)
            done += 10
            for job, since, tokens in [each for each in running if done - each[1] >= each[2]]:
                running.remove((job, since, tokens))
                ids = np.random.default_rng(job.seed).integers(5, 19, tokens, dtype=np.int32)
                response = continued(job, ids, np.full(tokens, -1.0, np.float32), "stop", self.version)
                yield Finished(*job.slot, response)

    def update_weights(self, version: int) -> None:
        """Set the version."""
        self.version = version

    def release(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def tokens_of(job: Job) -> int:
    """Return the length of a response: about that of its prompt's others, which the prompt's token says."""
    return min(int(job.prompt_ids[0]) + job.seed % 40, job.max_new)


class LengthScorer:
    """A scorer that rewards an even number of tokens."""

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Return the score at once."""
        future: Future[Score] = Future()
        future.set_result(Score(float(len(response.token_ids) % 2 == 0), Status.OK))
        return future


def prompts() -> list[Prompt]:
    """Return prompts that differ in length as those of a step do; every second one is long."""
    means = [20 + 10 * i if i % 2 else 120 for i in range(PROMPTS)]
    return [Prompt(f"paced:{i}", "paced", "", np.array([mean], np.int32)) for i, mean in enumerate(means)]


class Untaking:
    """An engine that cannot take jobs, so every rank gets every size-th prompt."""

    shares_weights, continuous_batching = False, True

    def __init__(self, engine: PacedEngine):
        self.version, self.generate = 0, engine.generate
        self.update_weights, self.release, self.close = engine.update_weights, engine.release, engine.close


def one_rollout(steps_s: Sequence[float], by_demand: bool) -> dict[str, object]:
    """Return a rollout of this rank's world. steps_s: seconds of a step of each rank's engine."""
    with join(DistConfig(timeout_s=60), torch.device("cpu")) as world:
        return rollout_of(world, steps_s[world.rank], by_demand)


def rollout_of(world: World, step_s: float, by_demand: bool) -> dict[str, object]:
    """Return the share of idle time, the seconds, and every token of the groups."""
    paced = PacedEngine(step_s)
    engine: Engine = paced if by_demand else Untaking(paced)
    asked, sampling = prompts(), Sampling(1.0, LIMIT, SAMPLES, seed=7)
    lengths = ResponseLengths({prompt.id: int(prompt.token_ids[0]) for prompt in asked})
    share = collect_share(world, engine, LengthScorer(), asked, sampling, lengths=lengths)
    rollout: Rollout = exchange(world, share, asked, ())
    return {
        "idle": rollout.idle_s / rollout.generate_s,
        "seconds": rollout.generate_s,
        "prompts": [group.prompt.id for group in rollout.groups],
        "tokens": [[r.token_ids.tolist() for r in group.responses] for group in rollout.groups],
        "rewards": [group.rewards.tolist() for group in rollout.groups],
    }
