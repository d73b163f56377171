"""`[eval]`, `[filter]` and `[endpoint]`: sampling to measure, during a run or on its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from or1.config.section import MOST_SECONDS, MOST_STEPS, MOST_TOKENS, FilePath, Section

_Samples = Annotated[int, Field(ge=1, le=65536)]


class EvalSet(Section):
    """`[[eval.sets]]`"""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=100)
    """Name in the metrics: eval/{name}/avg@k. Letters, digits, _, - and, but not at the start, dots."""
    path: FilePath
    """JSONL, JSON-array or parquet file of problems."""
    samples: _Samples = 1
    """Responses per problem: the k of avg@k and the largest of pass@k."""
    temperature: float = Field(1.0, ge=0, le=100)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this much probability; 1 is all of them."""
    limit: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Take only the first problems."""
    prompt_suffix: str | None = None
    """Text put after every question of this set; absent means that of [data]."""


class EvalConfig(Section):
    """`[eval]`"""

    every_steps: int = Field(20, ge=1, le=MOST_STEPS)
    """Steps between evaluations; the first and the last step always have one."""
    max_response_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    """Response limit of evaluations; absent means that of the last stage."""
    pass_k: tuple[_Samples, ...] = ()
    """The k of pass@k; absent means 1, 2, 4, ... and the number of samples. Those above it are left out."""
    sets: tuple[EvalSet, ...] = ()
    """Held-out sets."""


class FilterConfig(Section):
    """`[filter]`: how `or1 filter` measures the difficulty of every training prompt."""

    samples: _Samples = 16
    """Responses per prompt."""
    temperature: float = Field(1.0, ge=0, le=100)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this much probability; 1 is all of them."""
    max_response_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    """Response limit; absent means that of the last stage."""


class EndpointConfig(Section):
    """`[endpoint]`: a running server that `or1 eval` and `or1 filter` ask instead of loading the model."""

    url: str | None = Field(None, pattern=r"^https?://[^\s]+$")
    """Base of an OpenAI-compatible API, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model there; absent means the only one that the server lists."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the server wants one."""
    concurrency: int = Field(64, ge=1, le=65536)
    """Requests in flight."""
    timeout_s: float = Field(3600.0, ge=0.01, le=MOST_SECONDS)
    """Limit for one request."""
    retries: int = Field(5, ge=0, le=100)
    """Times a request is repeated, with growing pauses, after a refusal that may pass (429, 5xx, no connection)."""
