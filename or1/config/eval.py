"""`[eval]`, `[filter]` and `[endpoint]`: evaluation during a run, and sampling by `or1 eval` and `or1 filter`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from or1.config.data import ColumnsConfig
from or1.config.section import MOST_SECONDS, MOST_STEPS, MOST_TOKENS, FilePaths, Section

_Samples = Annotated[int, Field(ge=1, le=65536)]


class EvalSet(Section):
    """`[[eval.sets]]`: a held-out set."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=100)
    """Name in the metrics: eval/{name}/avg@k. Letters, digits, _ and -; also dots, except at the start."""
    path: FilePaths
    """Problems: a file, a folder, a pattern or a dataset, as in data.train; or a list of these."""
    samples: _Samples = 1
    """Responses per problem: the k of avg@k and the largest k of pass@k."""
    temperature: float = Field(1.0, ge=0, le=100)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens with this total probability; 1 means all tokens."""
    limit: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Use only this many problems, the first ones of the file; absent means all."""
    prompt_suffix: str | None = None
    """Text appended to every question of this set; absent means that of [data]."""
    columns: ColumnsConfig | None = None
    """Names of this set's columns; absent means those of [data] if the set has them, else those that or1 knows."""


class EvalConfig(Section):
    """`[eval]`"""

    every_steps: int = Field(20, ge=1, le=MOST_STEPS)
    """Steps between evaluations; there is always one before the first step and after the last."""
    max_response_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    """Response limit of evaluations; absent means that of the last stage."""
    pass_k: tuple[_Samples, ...] = ()
    """The values of k for pass@k; empty means 1, 2, 4, ... and the number of samples. Larger values are skipped."""
    sets: tuple[EvalSet, ...] = ()
    """Held-out sets."""


class FilterConfig(Section):
    """`[filter]`: sampling of `or1 filter`, which measures the difficulty of every training prompt."""

    samples: _Samples = 16
    """Responses per prompt."""
    temperature: float = Field(1.0, ge=0, le=100)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens with this total probability; 1 means all tokens."""
    max_response_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    """Response limit; absent means that of the last stage."""


class EndpointConfig(Section):
    """`[endpoint]`: a running server that `or1 eval` and `or1 filter` use instead of loading the model."""

    url: str | None = Field(None, pattern=r"^https?://[^\s]+$")
    """Base URL of an OpenAI-compatible API, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model on the server; absent means the only one that the server lists."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API key, if the server requires one."""
    concurrency: int = Field(64, ge=1, le=65536)
    """Largest number of simultaneous requests."""
    timeout_s: float = Field(3600.0, ge=0.01, le=MOST_SECONDS)
    """Time limit of one request, in seconds."""
    retries: int = Field(5, ge=0, le=100)
    """Number of retries of a request, with growing pauses, after a temporary failure (429, 5xx, no connection)."""
