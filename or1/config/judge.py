"""`[judge]`: models on servers that vote on training problems."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from or1.config.eval import EndpointConfig
from or1.config.section import MOST_SECONDS, MOST_TOKENS, FilePath, Section

_Url = Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
_Price = Annotated[float, Field(ge=0, le=1e9)]


class JudgeConfig(Section):
    """`[judge]`: models on servers that vote on training problems (`or1 filter CONFIG --judge URL`)."""

    url: tuple[_Url, ...] = ()
    """Base URLs of OpenAI-compatible APIs, such as http://localhost:8000/v1: one for each judge."""
    model: tuple[str, ...] = ()
    """Name of each judge on its server; absent means the only model that each server lists."""
    key_env: tuple[str, ...] = Field(("OPENAI_API_KEY",), min_length=1)
    """Environment variables with the API keys: one for each judge, or one for all. A variable that is not set is no
    key."""
    votes: int = Field(16, ge=1, le=1000)
    """Votes of each judge on each problem."""
    keep: int = Field(9, ge=1, le=65536)
    """Smallest number of votes, of all judges together, that must find a problem valid."""
    prompt: FilePath | None = None
    """File with the question to the judges, with {problem} where the problem belongs, and {answer} if its answer does.
    An answer must end with "Verdict: valid" or "Verdict: invalid". Absent means or1's own question."""
    temperature: float = Field(1.0, ge=0, le=100)
    """Sampling temperature."""
    max_tokens: int = Field(2048, ge=1, le=MOST_TOKENS)
    """Limit of a judge's answer; a longer answer counts as one without a verdict."""
    concurrency: int = Field(64, ge=1, le=65536)
    """Largest number of simultaneous requests, of all judges together."""
    timeout_s: float = Field(600.0, ge=0.01, le=MOST_SECONDS)
    """Time limit of one request, in seconds."""
    retries: int = Field(8, ge=0, le=100)
    """Number of retries of a request, with growing pauses, after a temporary failure (429, 5xx, no connection)."""
    price_in: tuple[_Price, ...] = ()
    """Price of a million prompt tokens, one for each judge or one for all; absent: costs are not shown."""
    price_out: tuple[_Price, ...] = ()
    """Price of a million completion tokens, as price_in."""

    def endpoints(self) -> tuple[EndpointConfig, ...]:
        """Return the server of each judge."""
        return tuple(
            EndpointConfig(
                url=url,
                model=self.model[i] if self.model else None,
                key_env=self.key_env[i if len(self.key_env) > 1 else 0],
                concurrency=self.concurrency,
                timeout_s=self.timeout_s,
                retries=self.retries,
            )
            for i, url in enumerate(self.url)
        )
