"""An engine without a model that takes weights while it generates, and whose speed the test decides."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from or1.core.errors import EngineError
from or1.core.types import Prompt, Response
from or1.rollout.engine import Finished, Job, Sampling, Slot, decoded, jobs_of
from tests.helpers.hand_run import ONE, ZERO

LIMIT_S = 60.0


class Typist:
    """One token after another, each of the version at its time; every response is as long as its limit.

    limits   tokens that a call with this seed may write so far; absent: any number
    calls    (seed, version at the start, ids of the prompts) of each call
    dies_at  raise EngineError when a call with this seed writes
    """

    shares_weights, continuous_batching = False, True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Mapping[int, int] | None = None):
        self.version, self.tokenizer, self.limits = 0, tokenizer, dict(limits or {})
        self.clock = threading.Condition()
        self.calls: list[tuple[int, int, list[str]]] = []
        self.typing: list[Typing] = []
        self.dies_at: int | None = None

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Typing:
        typing = Typing(self, list(jobs_of(prompts, sampling, slots)), sampling.seed)
        with self.clock:
            self.calls.append((sampling.seed, self.version, [prompt.id for prompt in prompts]))
            self.typing.append(typing)
        return typing

    def update_weights(self, version: int) -> None:
        with self.clock:
            self.version = version
            for typing in self.typing:
                typing.freeze()

    def limit(self, limits: Mapping[int, int]) -> None:
        """Replace the limits."""
        with self.clock:
            self.limits = dict(limits)
            self.clock.notify_all()

    def await_limits(self) -> None:
        """Wait until the calls that have limits have written so much."""
        with self.clock:
            done = self.clock.wait_for(lambda: all(self._written(s) == n for s, n in self.limits.items()), LIMIT_S)
            assert done

    def _written(self, seed: int) -> int:
        return sum(typing.count for typing in self.typing if typing.seed == seed)

    def tick(self, typing: Typing) -> int:
        """Wait until a call may write a token. Return the version that writes it."""
        with self.clock:
            assert self.clock.wait_for(lambda: typing.count < self.limits.get(typing.seed, 10**9), LIMIT_S)
            return self.version

    def note(self, typing: Typing) -> None:
        """Count a token that a call has written."""
        with self.clock:
            typing.count += 1
            self.clock.notify_all()

    def release(self) -> None: ...

    def close(self) -> None:
        self.limit({})


class Typing(Iterator[Finished]):
    """One call of `generate`."""

    def __init__(self, engine: Typist, jobs: list[Job], seed: int):
        self._engine, self._jobs, self.seed, self.count = engine, jobs, seed, 0
        self._written: dict[Slot, Response] = {job.slot: job.unfinished for job in jobs if job.unfinished is not None}
        self._frozen = dict(self._written)
        self._finished = self._run()

    def __next__(self) -> Finished:
        return next(self._finished)

    def unfinished(self) -> dict[Slot, Response]:
        return dict(self._frozen)

    def freeze(self) -> None:
        self._frozen = dict(self._written)

    def _run(self) -> Iterator[Finished]:
        for job in self._jobs:
            rng = np.random.default_rng(job.seed)
            for _ in range(job.max_new):
                version = self._engine.tick(self)
                if self.seed == self._engine.dies_at:
                    raise EngineError("the server died")
                self._written[job.slot] = _longer(self._written.get(job.slot), rng.choice([ZERO, ONE]), version)
                self._engine.note(self)
            yield decoded(job, self._written.pop(job.slot), self._engine.tokenizer)


def _longer(before: Response | None, token: int, version: int) -> Response:
    ids = np.array([*([] if before is None else before.token_ids), token], np.int32)
    versions = np.array([*([] if before is None else before.token_versions), version], np.int32)
    logp = np.full(len(ids), -np.log(2), np.float32)
    return Response(ids, logp, "length", version, "", versions=versions)
