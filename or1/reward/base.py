"""What every reward is to the trainer: a scorer that takes responses one at a time and never raises or hangs."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol, Self

from or1.types import Prompt, Response, Score


class ScorerError(ValueError):
    """A scorer that cannot work at all, found before the first response: the message names the cause and a remedy."""


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
