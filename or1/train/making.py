"""A rollout in the making: its work, what is finished of it, and what a resumed run needs to continue it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from or1.core.types import Group, OpenGroup, Prompt, Response, Score
from or1.dist.world import World
from or1.magic.stages import Step
from or1.reward.scorer import Scorer
from or1.rollout.across_ranks import collect_share, exchange
from or1.rollout.collect import Progress, Rollout
from or1.rollout.dealing import ResponseLengths
from or1.rollout.engine import Engine, Finished, Sampling, Slot, Supply, TakingEngine
from or1.run.in_flight import Begun

Work = Sequence[Group | OpenGroup | Prompt]
"""What a rollout consists of, in its order: complete groups, groups to continue, and prompts to begin."""
Part = tuple[int, int, Response, Score | None]
"""Index of a group in the rollout, index of a response in the group, the response, and its score if known."""


class Making:
    """One rollout in the making. Each rank has one for its share, and all ranks have the same work.

    step, sampling  of the rollout
    future          this rank's share of the rollout, once a thread makes it
    finished, total numbers of responses of this rank's share
    """

    def __init__(self, step: Step, work: Work, sampling: Sampling):
        self.step, self.sampling, self._work = step, sampling, list(work)
        self._carried = [i for i, each in enumerate(work) if isinstance(each, OpenGroup)]
        self._fresh = [i for i, each in enumerate(work) if isinstance(each, Prompt)]
        # What the engine and the scorer have returned so far, by the group's number in the call of `collect_share`.
        self._finished: dict[Slot, Response] = {}
        self._scores: dict[int, Future[Score]] = {}
        self._calls: list[tuple[Sequence[int], _Interruptible]] = []
        self.future: Future[Rollout] | None = None
        self.finished, self.total = 0, 0

    @property
    def carried(self) -> list[OpenGroup]:
        """Groups that the rollout continues."""
        return [cast(OpenGroup, self._work[i]) for i in self._carried]

    @property
    def prompts(self) -> list[Prompt]:
        """Prompts that the rollout begins with."""
        return [cast(Prompt, self._work[i]) for i in self._fresh]

    def share(
        self, world: World, engine: Engine, scorer: Scorer, progress: Progress, lengths: ResponseLengths
    ) -> Rollout:
        """Return this rank's share, and note what is finished on the way. lengths: as `collect_share`."""

        def noting(finished: int, total: int) -> None:
            self.finished, self.total = finished, total
            progress(finished, total)

        noted = cast(Engine, _NotingEngine(engine, self)), cast(Scorer, _NotingScorer(scorer, self))
        return collect_share(
            world, *noted, self.prompts, self.sampling, carried=self.carried, progress=noting, lengths=lengths
        )

    def whole(self, world: World, share: Rollout) -> Rollout:
        """Return the whole rollout, given this rank's share. Collective."""
        rollout = exchange(world, share, self.prompts, self.carried)
        if len(self._work) == len(self._carried) + len(self._fresh):
            return rollout
        # Groups that were complete in the checkpoint take their places among the others.
        made = dict(zip([*self._carried, *self._fresh], rollout.groups, strict=True))
        groups = [each if isinstance(each, Group) else made[i] for i, each in enumerate(self._work)]
        return replace(rollout, groups=groups)

    def require_success(self) -> None:
        """Raise the error that ended the thread, if it has ended by one."""
        if self.future is not None and self.future.done():
            self.future.result()

    def parts(self) -> list[Part]:
        """Return what this rank has made so far. Callable while another thread makes more.

        Pending responses are those of the last push: what the present weights have added to them is made again.
        """
        places = [*self._carried, *self._fresh]
        found: dict[Slot, Response] = {}
        for numbers, call in list(self._calls):
            found |= {(numbers[p], s): response for (p, s), response in call.unfinished().items()}
        found |= dict(self._finished)
        return [
            (places[p], s, response, self._score(response)) for (p, s), response in sorted(found.items(), key=_slot)
        ]

    def begun(self, parts: Iterable[Part], version: int) -> Begun:
        """Return the state of the rollout, given the parts of all ranks.

        version  of a response without a token
        """
        found = {(i, s): (response, score) for i, s, response, score in parts}
        groups: list[Group | OpenGroup] = []
        for i, each in enumerate(self._work):
            if isinstance(each, Group):
                groups.append(each)
                continue
            prompt, earlier = (each, None) if isinstance(each, Prompt) else (each.prompt, each)
            size = self.sampling.samples if earlier is None else len(earlier.responses)
            pairs = [found.get((i, s)) or _earlier(earlier, s) or (_nothing(version), None) for s in range(size)]
            responses, scores = tuple(r for r, _ in pairs), tuple(score for _, score in pairs)
            known = [score for score in scores if score is not None]
            complete = len(known) == size
            groups.append(Group(prompt, responses, tuple(known)) if complete else OpenGroup(prompt, responses, scores))
        return Begun(self.step.number, self.step.stage_index, groups)

    def note(self, slot: Slot, response: Response) -> None:
        """Note a finished response. slot: of the call of `collect_share`."""
        self._finished[slot] = response

    def note_call(self, numbers: Sequence[int], call: _Interruptible) -> None:
        """Note a call of the engine. numbers: of its prompts in the call of `collect_share`."""
        self._calls.append((numbers, call))

    def note_score(self, response: Response, score: Future[Score]) -> None:
        """Note that a response is being scored."""
        self._scores[id(response)] = score

    def _score(self, response: Response) -> Score | None:
        future = self._scores.get(id(response))
        return future.result() if future is not None and future.done() else None


@runtime_checkable
class _Interruptible(Protocol):
    """A call of an engine that takes weights while it generates."""

    def unfinished(self) -> Mapping[Slot, Response]:
        """Return the pending responses that have tokens, as they were at the last push."""
        ...


class _NotingEngine:
    """An engine whose finished responses a `Making` notes."""

    def __init__(self, engine: Engine, making: Making):
        self._engine, self._making = engine, making

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        numbers = range(len(prompts)) if sampling.numbers is None else sampling.numbers
        yield from self._noting(self._engine.generate(prompts, sampling, slots), numbers)

    def generate_from(self, supply: Supply, sampling: Sampling) -> Iterator[Finished]:
        # A supply has the jobs of the whole rollout, by their own numbers.
        yield from self._noting(cast(TakingEngine, self._engine).generate_from(supply, sampling), _EVERY_NUMBER)

    def _noting(self, call: Iterator[Finished], numbers: Sequence[int]) -> Iterator[Finished]:
        if isinstance(call, _Interruptible):
            self._making.note_call(numbers, call)
        try:
            for finished in call:
                self._making.note((numbers[finished.prompt], finished.sample), finished.response)
                yield finished
        finally:
            # Noted, a call would outlive an error, and its requests with it.
            if (close := getattr(call, "close", None)) is not None:
                close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class _NotingScorer:
    """A scorer whose scores a `Making` notes."""

    def __init__(self, scorer: Scorer, making: Making):
        self._scorer, self._making = scorer, making

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        score = self._scorer.submit(prompt, response)
        self._making.note_score(response, score)
        return score

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)


_EVERY_NUMBER = range(1 << 40)


def _earlier(group: OpenGroup | None, sample: int) -> tuple[Response, Score | None] | None:
    return None if group is None else (group.responses[sample], group.scores[sample])


def _nothing(version: int) -> Response:
    return Response(np.empty(0, np.int32), np.empty(0, np.float32), "length", version, "")


def _slot(item: tuple[Slot, Response]) -> Slot:
    return item[0]
