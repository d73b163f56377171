"""What every reward is to the trainer: a scorer that takes responses one at a time and never raises or hangs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, Self

from or1.core.errors import ScorerError
from or1.core.types import Group, Prompt, Response, Score, Status


class Scorer(Protocol):
    """Scores responses as they arrive. Made once per run by `or1.reward.make_scorer`; safe to call from any thread."""

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Start scoring one response.

        The future always gets a Score, in bounded time: what goes wrong while scoring is a `Status`, not an exception.
        It cannot be cancelled, and equal responses may share one. From asyncio, `await asyncio.wrap_future(...)`.
        """
        ...

    def close(self) -> None:
        """Stop at once; responses still waiting become `Status.CRASH`. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def require_rewards(step: int, groups: Sequence[Group]) -> None:
    """Raise ScorerError if grading failed for every response of a step: nothing would ever be learnt."""
    scores = [score for group in groups for score in group.scores]
    counts = Counter(score.status for score in scores)
    crashes, timeouts = counts[Status.CRASH], counts[Status.TIMEOUT]
    if not scores or crashes + timeouts < len(scores):
        return
    last = next((f"; the last: {score.cause}" for score in reversed(scores) if score.cause), "")
    raise ScorerError(
        f"none of the {len(scores)} responses of step {step} has a reward: the function of reward.kind crashed on "
        f"{crashes} and took longer than reward.timeout_s on {timeouts}{last}. Mend the function, or raise the limit; "
        "the same command goes on"
    )
