"""The interface between the trainer and every reward: a scorer that takes one response and returns a future."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, Self

from or1.core.errors import ScorerError
from or1.core.types import Group, Prompt, Response, Score, Status


class Scorer(Protocol):
    """A reward for responses that arrive one at a time. `or1.reward.make_scorer` makes it once per run. Thread-safe."""

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Start to score one response and return immediately.

        The future always gets a Score within a bounded time. A failure of grading is a `Status`, never an exception.
        The future cannot be cancelled, and equal responses may share one. In asyncio: `asyncio.wrap_future(future)`.
        """
        ...

    def close(self) -> None:
        """Stop immediately. Responses that still wait get `Status.CRASH`. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def scored(score: Score) -> Future[Score]:
    """Return a finished future that holds `score`."""
    future: Future[Score] = Future()
    future.set_result(score)
    return future


def require_rewards(step: int, groups: Sequence[Group]) -> None:
    """Raise ScorerError if every response of a step crashed or timed out, since the step then trains nothing."""
    scores = [score for group in groups for score in group.scores]
    counts = Counter(score.status for score in scores)
    crashes, timeouts = counts[Status.CRASH], counts[Status.TIMEOUT]
    if not scores or crashes + timeouts < len(scores):
        return
    last = next((f"; the last: {score.cause}" for score in reversed(scores) if score.cause), "")
    raise ScorerError(
        f"none of the {len(scores)} responses of step {step} has a reward: the function of reward.kind or the "
        f"environment crashed on {crashes} and took longer than its timeout_s on "
        f"{timeouts}{last}. Fix it or raise the limit, then resume the run with the same command"
    )
