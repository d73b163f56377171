"""`EnvironmentEngine`: an engine whose responses are whole episodes, sampled by the engine of `[rollout]`.

The episodes run at the same time. When all of them wait for the model, their requests become one batch. The embedded
engine therefore gets the same batches in every run of the same seed. vLLM needs no such order: its requests are sent as
soon as there is one.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np

from or1.core.errors import EngineError
from or1.core.seeds import seed_of
from or1.core.text import visible
from or1.core.types import Prompt, Response, Score, Status
from or1.environment.outcome import NOTHING, Trained, Unusable, failure_of, response_of, score_of, sequence_of
from or1.reward.scorer import scored
from or1.rollout.engine import Engine, Finished, Sampling, Slot

_log = logging.getLogger(__name__)
_LOGGED_CRASHES = 5
_GATHER_S = 0.01
"""How long requests to an engine with continuous batching are gathered."""
_PATIENCE_S = 10.0
"""How long a cancelled episode may take to end; then it is given up, and its thread is left to it."""
_KNOWN = {
    "temperature",
    "max_tokens",
    "logprobs",
    "stop_token_ids",
    "skip_special_tokens",
    "routed_experts_prompt_start",
}
"""Fields of a request that or1 obeys, or that have no effect on what is sampled."""


class Stage(Protocol):
    """What plays the episodes: `or1.environment.host.Host`, or a substitute in a test."""

    def play(self, episode: int, task: Any, temperature: float) -> None: ...

    def next_event(self, timeout_s: float) -> Any: ...

    def cancel(self, episode: int) -> None: ...


@dataclass
class _Live:
    """An episode in progress.

    since    when it last got an answer, in seconds of `time.monotonic`
    calls    its requests that wait for an answer
    turns    answers so far
    cut      why it ends early: "length" or "deadline"
    fault    reason why its requests are a fault of the environment
    cancelled  when it was cancelled, None if it was not
    """

    slot: Slot
    prompt: Prompt
    since: float
    calls: list[Any] = field(default_factory=list)
    turns: int = 0
    cut: str = ""
    fault: str = ""
    cancelled: float | None = None


class EnvironmentEngine:
    """Plays episodes with `engine`. Implements `Engine`; `scorer` gets the scores of its responses.

    tasks      the task of each prompt, by the prompt's id
    timeout_s  longest time that an episode may spend between two requests
    """

    def __init__(
        self,
        engine: Engine,
        stage: Stage,
        tasks: Mapping[str, Any],
        tokenizer: Any,
        timeout_s: float,
        scorer: EpisodeScorer,
    ):
        self._engine, self._stage, self._tasks = engine, stage, tasks
        self._tokenizer, self._timeout_s = tokenizer, timeout_s
        self._numbers = itertools.count()
        self._scorer = scorer
        self.shares_weights, self.continuous_batching = engine.shares_weights, engine.continuous_batching

    @property
    def version(self) -> int:
        """Policy version of the weights."""
        return self._engine.version

    def update_weights(self, version: int) -> None:
        """Load the trainer's current weights, as `Engine`."""
        self._engine.update_weights(version)

    def release(self) -> None:
        """Free the memory that only generation needs, as `Engine`."""
        self._engine.release()

    def close(self) -> None:
        """Do nothing: the owner of the engine closes it."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield the response of every episode as it ends, as `Engine.generate`."""
        if any(slot is not None for slot in (slots or {}).values()) or sampling.new_tokens is not None:
            raise EngineError("an episode cannot continue in a later step; remove rollout.partial_tokens")
        began = time.monotonic()
        wanted = list(slots or itertools.product(range(len(prompts)), range(sampling.samples)))
        live: dict[int, _Live] = {}
        for p, s in wanted:
            number = next(self._numbers)
            live[number] = _Live((p, s), prompts[p], began)
            self._stage.play(number, self._tasks[prompts[p].id], sampling.temperature)
        ends = math.inf if sampling.deadline_s is None else began + sampling.deadline_s
        try:
            while live:
                all_wait = all(each.calls for each in live.values())
                event = None if all_wait else self._stage.next_event(self._wait_s(live, ends))
                if event is not None:
                    if event.episode not in live:
                        continue
                    if hasattr(event, "result"):
                        yield self._finished(live.pop(event.episode), event.result)
                    else:
                        live[event.episode].calls.append(event)
                    continue
                yield from self._expire(live, ends)
                if all_wait or self.continuous_batching:
                    self._answer(live, sampling, ends)
        finally:
            for number in live:
                self._stage.cancel(number)

    def _wait_s(self, live: Mapping[int, _Live], ends: float) -> float:
        """Return the seconds after which something must be done though no event came."""
        busy = [each for each in live.values() if not each.calls]
        if self.continuous_batching and len(busy) < len(live):
            return _GATHER_S
        return max(min(self._limit(each, ends) for each in busy) - time.monotonic(), 0.0) + 0.001

    def _limit(self, each: _Live, ends: float) -> float:
        """Return when an episode that is busy must be cancelled, or be given up if it was cancelled."""
        return min(each.since + self._timeout_s, ends) if each.cancelled is None else each.cancelled + _PATIENCE_S

    def _expire(self, live: dict[int, _Live], ends: float) -> Iterator[Finished]:
        """Cancel busy episodes that exceeded their time, and give up those that cannot be cancelled."""
        now = time.monotonic()
        for number, each in list(live.items()):
            if each.calls or now < self._limit(each, ends):
                continue
            if each.cancelled is None:
                each.cancelled = now
                each.cut = each.cut or ("deadline" if now >= ends else "")
                self._stage.cancel(number)
            else:
                yield self._finished(live.pop(number), None)

    def _answer(self, live: Mapping[int, _Live], sampling: Sampling, ends: float) -> None:
        """Sample a completion for every request that waits."""
        left_s = ends - time.monotonic()
        asked: dict[int | None, list[tuple[_Live, Any]]] = {}
        # By slot, not by arrival, so that a batch of the embedded engine is the same in every run.
        answered = sorted((each for each in live.values() if each.calls), key=lambda each: each.slot)
        for each in answered:
            calls, each.calls = each.calls, []
            for call in calls:
                if refusal := self._refusal(each, call, sampling, left_s):
                    call.refuse(refusal)
                else:
                    asked.setdefault(call.sampling.get("max_tokens"), []).append((each, call))
        for limit, group in asked.items():
            timed = replace(sampling, new_tokens=limit, deadline_s=left_s if math.isfinite(left_s) else None)
            self._sample(group, timed)
        now = time.monotonic()
        for each in answered:
            each.since = now

    def _refusal(self, each: _Live, call: Any, sampling: Sampling, left_s: float) -> str:
        """Return why a request gets no completion, "" if it gets one. The episode then ends early."""
        if left_s <= 0:
            each.cut = "deadline"
            return "the deadline of the rollout has passed"
        prompt_ids = each.prompt.token_ids
        if not np.array_equal(call.token_ids[: len(prompt_ids)], prompt_ids):
            each.fault = "a request does not begin with the tokens of the prompt of its task"
        elif call.sampling.get("temperature", sampling.temperature) != sampling.temperature:
            each.fault = f"it asks for temperature {call.sampling['temperature']}; set rollout.temperature instead"
        elif unknown := sorted(set(call.sampling) - _KNOWN):
            each.fault = f"it asks for {unknown[0]}, which or1 does not sample with"
        elif len(call.token_ids) - len(prompt_ids) >= sampling.max_tokens:
            each.cut = "length"
            return f"the conversation has reached max_response_tokens = {sampling.max_tokens}"
        return each.fault

    def _sample(self, group: list[tuple[_Live, Any]], sampling: Sampling) -> None:
        """Answer requests. The conversation after the prompt is an unfinished response, which the engine continues."""
        prompts: list[Prompt] = []
        numbers: list[int] = []
        slots: dict[Slot, Response | None] = {}
        for i, (each, call) in enumerate(group):
            p, s = each.slot
            number = p if sampling.numbers is None else sampling.numbers[p]
            before = np.array(call.token_ids[len(each.prompt.token_ids) :], np.int32)
            prompts.append(each.prompt)
            # The first turn has the random numbers of a response without an environment, later turns their own.
            numbers.append(number if not each.turns else seed_of(number, each.turns))
            slots[i, s] = Response(before, np.zeros(len(before), np.float32), "length", self.version, "")
            if not len(before):
                slots[i, s] = None
            each.turns += 1
        # A stop waits for the end of the episodes: a conversation cannot be continued by a later run.
        whole = replace(sampling, numbers=tuple(numbers), stop=bool)
        for i, _, response in self._engine.generate(prompts, whole, slots):
            each, call = group[i]
            start = len(call.token_ids) - len(each.prompt.token_ids)
            if response.finish == "deadline":
                each.cut = "deadline"
            finish = "stop" if response.finish == "stop" else "length"
            call.answer(response.token_ids[start:].tolist(), response.logp[start:].astype(float).tolist(), finish)

    def _finished(self, each: _Live, result: Any) -> Finished:
        sequence, score = self._outcome(each, result)
        response = response_of(sequence, self.version, self._tokenizer)
        self._scorer.note(response, score)
        return Finished(*each.slot, response)

    def _outcome(self, each: _Live, result: Any) -> tuple[Trained, Score]:
        """Return what an episode leaves, and its score. `result`: verifiers' Episode, a reason, or None."""
        try:
            sequence = (
                NOTHING if result is None or isinstance(result, str) else sequence_of(result, each.prompt.token_ids)
            )
            unusable = ""
        except Unusable as error:
            sequence, unusable = NOTHING, str(error)
        if each.fault:
            return sequence, Score(math.nan, Status.CRASH, each.fault)
        if each.cut and (result is None or isinstance(result, str) or not result.ok):
            # Ended by a limit of or1, so the environment did not score the episode.
            return sequence._replace(finish=each.cut), Score(0.0, Status.TRUNCATED)
        if result is None:
            return sequence, Score(math.nan, Status.TIMEOUT, f"no request within {self._timeout_s:g} s")
        if isinstance(result, str):
            return sequence, Score(math.nan, Status.CRASH, result)
        if not result.ok:
            return sequence, failure_of(result)
        if unusable:
            return sequence, Score(math.nan, Status.CRASH, unusable)
        return sequence._replace(finish=each.cut or sequence.finish), score_of(result)


class EpisodeScorer:
    """The rewards that episodes came with. Implements `Scorer`."""

    def __init__(self) -> None:
        self._scores: dict[int, tuple[Response, Score]] = {}
        self._crashes = 0

    def note(self, response: Response, score: Score) -> None:
        """Keep the score of a response until `submit` asks for it."""
        self._crashes += score.status is Status.CRASH
        if score.status is Status.CRASH and self._crashes <= _LOGGED_CRASHES:
            _log.warning("an episode crashed: %.500s", visible(score.cause))
        # The response is kept too, so that no other object gets its id.
        self._scores[id(response)] = response, score

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Return the score of a response, as `Scorer`."""
        return scored(self._scores.pop(id(response))[1])

    def close(self) -> None:
        """Do nothing, as `Scorer`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
