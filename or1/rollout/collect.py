"""Collection of responses and scores into groups, while the engine generates the remaining responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from or1.core.pulse import pulse
from or1.core.types import Group, OpenGroup, Prompt, Response, Score
from or1.reward.scorer import Scorer, scored
from or1.rollout.engine import INTERRUPTED, Engine, Job, Sampling, Slot, Supply, TakingEngine, jobs_of

Progress = Callable[[int, int], None]
"""progress(finished, total): called with numbers of responses."""

NOT_STARTED = Response(np.empty(0, np.int32), np.empty(0, np.float32), finish=INTERRUPTED, version=0, text="")
"""Stands for a response of which a stopped call has no token."""


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Rollout:
    """Groups of scored responses, in prompt order.

    groups      groups whose responses are all scored
    generate_s  seconds of generation, of the slowest rank
    reward_s    seconds of scoring after the end of generation
    open        groups with unfinished responses, to continue in a later call (partial rollouts)
    interrupted `Sampling.stop` ended the call early: then `groups` is empty, and `open` holds every group, complete or
                not, in prompt order. A call with the same sampling that carries them completes the rollout
    idle_s      mean over the ranks of the seconds between the end of their generation and that of the slowest rank
    """

    groups: list[Group]
    generate_s: float
    reward_s: float
    open: list[OpenGroup] = field(default_factory=list)
    interrupted: bool = False
    idle_s: float = 0.0

    def plus(self, other: Rollout) -> Rollout:
        """Return the concatenation of both; seconds are summed."""
        return Rollout(
            groups=self.groups + other.groups,
            generate_s=self.generate_s + other.generate_s,
            reward_s=self.reward_s + other.reward_s,
            open=self.open + other.open,
            idle_s=self.idle_s + other.idle_s,
        )


class RolloutInterrupted(Exception):
    """A stop was requested before the rollout of a step was complete. What is finished is in `InFlight`."""


class Part(NamedTuple):
    """One response of a rollout that several ranks make together.

    prompt  index of the prompt in the rollout
    sample  index among the prompt's samples
    score   None if a later call continues the response, or scores the response after a stop
    """

    prompt: int
    sample: int
    response: Response
    score: Score | None


@dataclass(frozen=True)
class Share(Rollout):
    """What one rank made of a rollout whose jobs the ranks shared: single responses, in any order, and no groups.

    samples      responses of each group
    interrupted  this rank was asked to stop; others may have made what is missing
    """

    samples: int = 0
    parts: list[Part] = field(default_factory=list)


def collect(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    progress: Progress = no_progress,
    *,
    carried: Sequence[OpenGroup] = (),
    release: Callable[[Group], None] | None = None,
    order: Callable[[Sequence[Job]], Sequence[int]] | None = None,
) -> Rollout:
    """Generate `sampling.samples` responses to every prompt, and score each response as it finishes.

    carried  groups of an earlier call with unfinished responses, which this call continues; they come first
    release  called with each group once all of its scores are known, while others are still being generated
    order    returns the indices of the jobs in the order in which the engine is to start them; None: prompt order

    With `sampling.new_tokens` set, a response that is unfinished at that limit or at the deadline is kept for a later
    call, in `Rollout.open`. Without it, such a response is truncated.

    Once `sampling.stop` returns True, the call ends early; see `Rollout.interrupted`.
    """
    began = time.perf_counter()
    collection = _Collection(scorer, prompts, sampling, carried)
    slots = collection.slots()
    if order is not None:
        pending = list(jobs_of(collection.prompts, sampling, slots))
        slots = {pending[i].slot: pending[i].unfinished for i in order(pending)}
    for p, s, response in engine.generate(collection.prompts, sampling, slots):
        collection.add((p, s), response)
        progress(collection.finished, collection.total)
        for group in collection.newly_scored(wait=False):
            if release is not None:
                release(group)
    generated = time.perf_counter()
    if collection.missing and sampling.stop():
        return Rollout([], generate_s=generated - began, reward_s=0.0, open=collection.all_groups(), interrupted=True)
    for group in collection.newly_scored(wait=True):
        if release is not None:
            release(group)
    return Rollout(
        groups=collection.scored_groups(),
        generate_s=generated - began,
        reward_s=time.perf_counter() - generated,
        open=collection.unfinished_groups(),
    )


def collect_parts(
    engine: TakingEngine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    deal: Callable[[Sequence[Job]], Supply],
    *,
    carried: Sequence[OpenGroup] = (),
    scores: Callable[[int], bool],
    progress: Callable[[int], None],
) -> Share:
    """Generate and score this rank's part of a rollout, as `collect` does the whole.

    deal      returns the jobs that this rank takes, given those of all ranks
    scores    True for the carried groups, by index, whose complete responses this rank scores
    progress  called after each response with the number of responses since the last call, which is 1
    """
    began = time.perf_counter()
    collection = _Collection(scorer, prompts, sampling, carried, scores=scores)
    supply = deal(list(jobs_of(collection.prompts, sampling, collection.slots())))
    for p, s, response in engine.generate_from(supply, sampling):
        collection.add((p, s), response)
        progress(1)
    generated = time.perf_counter()
    stopped = sampling.stop()
    parts = collection.parts(wait=not stopped)
    return Share(
        groups=[],
        generate_s=generated - began,
        reward_s=time.perf_counter() - generated,
        interrupted=stopped,
        samples=sampling.samples,
        parts=parts,
    )


class _Collection:
    """State of one call of `collect`.

    A response is pending until the engine yields it. Then it is finished and submitted for scoring, or it is unfinished
    and left to a later call. A group is finished when all of its responses are, and scored when all scores are known.
    """

    def __init__(
        self,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        carried: Sequence[OpenGroup],
        *,
        scores: Callable[[int], bool] | None = None,
    ) -> None:
        self._scorer, self._sampling = scorer, sampling
        self.prompts = [group.prompt for group in carried] + list(prompts)
        self._sizes = [len(group.responses) for group in carried] + [sampling.samples] * len(prompts)
        self._not_finished = list(self._sizes)  # For each group, the number of its responses that are not finished.
        self._finished: set[int] = set()  # Groups that are finished and not yet scored.
        self._scored: dict[int, Group] = {}
        self._responses: dict[Slot, Response] = {}
        self._scores: dict[Slot, Future[Score]] = {}
        self._unfinished: dict[Slot, Response] = {}  # Responses of earlier calls, to continue.
        self._made: list[Slot] = []  # Slots that changed in this call.
        self._elsewhere: set[Slot] = set()  # Slots that another rank submits for scoring.
        for p, group in enumerate(carried):
            for s, (response, score) in enumerate(zip(group.responses, group.scores, strict=True)):
                self._responses[p, s] = response
                if score is not None:
                    self._finish((p, s), scored(score))
                elif response.finish == "stop" or len(response.token_ids) >= sampling.max_tokens:
                    # Finished and not yet scored when the run ended, or the limit is smaller than in the earlier call
                    # (a new stage), so the response cannot continue.
                    if scores is None or scores(p):
                        self._made.append((p, s))
                        self._finish((p, s), scorer.submit(group.prompt, response))
                    else:
                        self._elsewhere.add((p, s))
                elif len(response.token_ids):
                    self._unfinished[p, s] = response
        self.total = sum(self._sizes)
        self.missing = {(p, s) for p, size in enumerate(self._sizes) for s in range(size)} - self._scores.keys()
        """Slots whose response this call has not completed yet."""

    @property
    def finished(self) -> int:
        """Number of finished responses."""
        return len(self._scores)

    def slots(self) -> Mapping[Slot, Response | None] | None:
        """Return the pending slots, as the argument `slots` of `Engine.generate`."""
        slots = [(p, s) for p, size in enumerate(self._sizes) for s in range(size)]
        if len(self._sizes) * self._sampling.samples == len(slots) and not self._responses:
            return None
        return {
            slot: self._unfinished.get(slot)
            for slot in slots
            if slot not in self._scores and slot not in self._elsewhere
        }

    def add(self, slot: Slot, response: Response) -> None:
        """Store a response that the engine yielded; submit the response for scoring if it is finished."""
        self._responses[slot] = response
        self._made.append(slot)
        pulse()
        if response.finish == INTERRUPTED:
            return
        self.missing.discard(slot)
        if not self._continues(response, self._unfinished.get(slot)):
            self._finish(slot, self._scorer.submit(self.prompts[slot[0]], response))

    def _finish(self, slot: Slot, score: Future[Score]) -> None:
        self._scores[slot] = score
        self._not_finished[slot[0]] -= 1
        if not self._not_finished[slot[0]]:
            self._finished.add(slot[0])

    def _continues(self, response: Response, before: Response | None) -> bool:
        """Return True if a later call is to continue the response; `before` is its state before this call."""
        if self._sampling.new_tokens is None or response.finish == "stop":
            return False
        # A response to which a whole call added no token might never finish, so it counts as truncated.
        added = len(response.token_ids) - (0 if before is None else len(before.token_ids))
        return added > 0 and len(response.token_ids) < self._sampling.max_tokens

    def newly_scored(self, wait: bool) -> Iterator[Group]:
        """Yield finished groups whose scores are all known; with `wait`, wait for the scores of all finished groups."""
        for p in list(self._finished):
            scores = [self._scores[p, s] for s in range(self._sizes[p])]
            if wait or all(score.done() for score in scores):
                self._finished.discard(p)
                responses = tuple(self._responses[p, s] for s in range(self._sizes[p]))
                pulse()
                self._scored[p] = Group(self.prompts[p], responses, tuple(score.result() for score in scores))
                yield self._scored[p]

    def parts(self, wait: bool) -> list[Part]:
        """Return the responses that changed in this call; with `wait`, wait for their scores."""
        found = []
        for slot in self._made:
            score = self._score_now(slot)
            if wait:
                score = self._scores[slot].result() if slot in self._scores else None
            pulse()
            found.append(Part(*slot, self._responses[slot], score))
        return found

    def scored_groups(self) -> list[Group]:
        """Return the scored groups, in prompt order."""
        return [self._scored[p] for p in sorted(self._scored)]

    def unfinished_groups(self) -> list[OpenGroup]:
        """Return the groups that a later call is to continue, in prompt order."""
        return [self._unfinished_group(p) for p in range(len(self.prompts)) if p not in self._scored]

    def all_groups(self) -> list[OpenGroup]:
        """Return every group as it is now, complete or not, in prompt order; for a call that was stopped."""
        return [self._group_now(p) for p in range(len(self.prompts))]

    def _group_now(self, p: int) -> OpenGroup:
        slots = [(p, s) for s in range(self._sizes[p])]
        return OpenGroup(
            self.prompts[p],
            tuple(self._responses.get(slot, NOT_STARTED) for slot in slots),
            tuple(self._score_now(slot) for slot in slots),
        )

    def _score_now(self, slot: Slot) -> Score | None:
        """Return the score of a finished response. None, to be graded later, if the score is not ready."""
        score, response = self._scores.get(slot), self._responses.get(slot, NOT_STARTED)
        # What has neither an end nor the full length would look unfinished later, so its score is waited for.
        if score is None or not (
            score.done() or (response.finish != "stop" and len(response.token_ids) < self._sampling.max_tokens)
        ):
            return None
        return score.result()

    def _unfinished_group(self, p: int) -> OpenGroup:
        slots = [(p, s) for s in range(self._sizes[p])]
        scores = tuple(self._scores[slot].result() if slot in self._scores else None for slot in slots)
        return OpenGroup(self.prompts[p], tuple(self._responses[slot] for slot in slots), scores)
