"""A reward that is the weighted sum of several rewards, `[[reward.parts]]`."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from or1.core.types import Prompt, Response, Score, Status
from or1.reward.scorer import Scorer

_FAULTS = (Status.CRASH, Status.TIMEOUT)


@dataclass(frozen=True)
class Part:
    """One reward of a sum.

    name    in the metrics: reward/part/{name}
    weight  factor of the reward
    """

    name: str
    weight: float


class PartsScorer:
    """The weighted sum of several scorers as a `Scorer`. `remarks` are the warnings of all user-defined functions."""

    def __init__(self, scorers: Mapping[Part, Scorer]):
        self._scorers = scorers
        self.remarks = [line for scorer in scorers.values() for line in getattr(scorer, "remarks", ())]

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Start to score one response with every part (see `Scorer`)."""
        parts = list(self._scorers)
        futures = [self._scorers[part].submit(prompt, response) for part in parts]
        total: Future[Score] = Future()
        lock, left = threading.Lock(), len(futures)

        def note(_: Future[Score]) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                total.set_result(weighted_sum(parts, [future.result() for future in futures]))

        for future in futures:
            future.add_done_callback(note)
        return total

    def close(self) -> None:
        """Stop the workers of all parts."""
        with ExitStack() as stack:
            for scorer in self._scorers.values():
                stack.callback(scorer.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def weighted_sum(parts: Sequence[Part], scores: Sequence[Score]) -> Score:
    """Return sum_i weight_i * reward_i, with the reward of each part.

    A part that returned None counts as absent, as in TRL. A part that crashed or timed out without a reward leaves the
    response without a reward: its sum would not be comparable with that of its group. The status is that of the first
    part that gave a reward.
    """
    each = tuple((part.name, score.reward) for part, score in zip(parts, scores, strict=True))
    given = [(part.weight, score) for part, score in zip(parts, scores, strict=True) if not math.isnan(score.reward)]
    failed = next((s for s in scores if math.isnan(s.reward) and s.status in _FAULTS), None)
    if failed is not None or not given:
        failed = failed or scores[0]
        return Score(math.nan, failed.status, failed.cause, each)
    cause = next((score.cause for score in scores if score.cause), "")
    return Score(math.fsum(weight * score.reward for weight, score in given), given[0][1].status, cause, each)
