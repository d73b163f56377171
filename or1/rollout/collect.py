"""Responses and their scores, gathered into groups while the engine goes on generating."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from or1.core.types import Group, OpenGroup, Prompt, Response, Score
from or1.reward.scorer import Scorer, scored
from or1.rollout.engine import Engine, Sampling, Slot

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Rollout:
    """Groups in prompt order; `open` are those some of whose responses are unfinished (partial rollouts).

    generate_s: seconds of generation. reward_s: seconds of scoring not hidden behind it.
    """

    groups: list[Group]
    generate_s: float
    reward_s: float
    open: list[OpenGroup] = field(default_factory=list)

    def plus(self, other: Rollout) -> Rollout:
        """Both one after the other."""
        return Rollout(
            self.groups + other.groups,
            self.generate_s + other.generate_s,
            self.reward_s + other.reward_s,
            self.open + other.open,
        )


def collect(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    progress: Progress = no_progress,
    *,
    carried: Sequence[OpenGroup] = (),
    release: Callable[[Group], None] | None = None,
) -> Rollout:
    """Generate `sampling.samples` responses to every prompt, scoring each as it finishes.

    `carried` groups come first: their finished responses stay, the others go on. With `sampling.new_tokens` set, a
    response that is unfinished at that limit or at the deadline leaves its group open instead of being truncated.
    `release` is called with each group as soon as its last score is there, while others are still being generated.
    """
    began = time.perf_counter()
    gathering = _Gathering(scorer, prompts, sampling, carried)
    for p, s, response in engine.generate(gathering.prompts, sampling, gathering.to_generate()):
        gathering.add((p, s), response)
        progress(gathering.filled, gathering.total)
        for group in gathering.close(wait=False):
            if release is not None:
                release(group)
    generated = time.perf_counter()
    for group in gathering.close(wait=True):
        if release is not None:
            release(group)
    closed = gathering.closed
    still_open = [gathering.as_open(p) for p in range(len(gathering.prompts)) if p not in closed]
    return Rollout([closed[p] for p in sorted(closed)], generated - began, time.perf_counter() - generated, still_open)


class _Gathering:
    """Slots of a call: what has finished, what is being scored, what stays open."""

    def __init__(
        self, scorer: Scorer, prompts: Sequence[Prompt], sampling: Sampling, carried: Sequence[OpenGroup]
    ) -> None:
        self._scorer, self._sampling = scorer, sampling
        self.prompts = [group.prompt for group in carried] + list(prompts)
        self._sizes = [len(group.responses) for group in carried] + [sampling.samples] * len(prompts)
        self._missing = list(self._sizes)
        self._full: set[int] = set()
        self.closed: dict[int, Group] = {}
        self._responses: dict[Slot, Response] = {}
        self._scores: dict[Slot, Future[Score]] = {}
        self._begun: dict[Slot, Response] = {}
        for p, group in enumerate(carried):
            for s, (response, score) in enumerate(zip(group.responses, group.scores, strict=True)):
                self._responses[p, s] = response
                if score is not None:
                    self._score((p, s), scored(score))
                elif len(response.token_ids) >= sampling.max_tokens:
                    # A stage with a smaller limit began: there is no room to go on.
                    self._score((p, s), scorer.submit(group.prompt, response))
                else:
                    self._begun[p, s] = response
        self.total = sum(self._sizes)

    @property
    def filled(self) -> int:
        """Responses that need no more generation in this call."""
        return len(self._scores)

    def to_generate(self) -> Mapping[Slot, Response | None] | None:
        """See `Engine.generate`."""
        slots = [(p, s) for p, size in enumerate(self._sizes) for s in range(size)]
        if len(self._sizes) * self._sampling.samples == len(slots) and not self._responses:
            return None
        return {slot: self._begun.get(slot) for slot in slots if slot not in self._scores}

    def add(self, slot: Slot, response: Response) -> None:
        """Take what the engine made of a slot."""
        before = self._begun.get(slot)
        self._responses[slot] = response
        if self._goes_on(response, before):
            return
        self._score(slot, self._scorer.submit(self.prompts[slot[0]], response))

    def _score(self, slot: Slot, score: Future[Score]) -> None:
        self._scores[slot] = score
        self._missing[slot[0]] -= 1
        if not self._missing[slot[0]]:
            self._full.add(slot[0])

    def _goes_on(self, response: Response, before: Response | None) -> bool:
        if self._sampling.new_tokens is None or response.finish == "stop":
            return False
        # A response that a whole call did not advance would be carried for ever; it counts as truncated instead.
        added = len(response.token_ids) - (0 if before is None else len(before.token_ids))
        return added > 0 and len(response.token_ids) < self._sampling.max_tokens

    def close(self, wait: bool) -> Iterator[Group]:
        """Groups that have become complete: all their responses have a score. `wait`: for scores being computed."""
        for p in list(self._full):
            scores = [self._scores[p, s] for s in range(self._sizes[p])]
            if wait or all(score.done() for score in scores):
                self._full.discard(p)
                responses = tuple(self._responses[p, s] for s in range(self._sizes[p]))
                self.closed[p] = Group(self.prompts[p], responses, tuple(score.result() for score in scores))
                yield self.closed[p]

    def as_open(self, p: int) -> OpenGroup:
        """A group that goes on in a later call."""
        slots = [(p, s) for s in range(self._sizes[p])]
        scores = tuple(self._scores[slot].result() if slot in self._scores else None for slot in slots)
        return OpenGroup(self.prompts[p], tuple(self._responses[slot] for slot in slots), scores)
