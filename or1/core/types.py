"""Data types of a training step. Arrays are numpy on the host; torch is first used in `or1.model.rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np


class Status(StrEnum):
    """Outcome of scoring one response; metrics count every value by name.

    OK         correct, or a user-defined reward above 0
    WRONG      incorrect, or a user-defined reward of at most 0
    NO_ANSWER  the response contains nothing to grade
    TRUNCATED  cut at the token limit, or still inside the thinking block
    TIMEOUT    grading took too long
    CRASH      grading failed
    SKIPPED    the user-defined reward returned None: no reward
    """

    OK = "ok"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    CRASH = "crash"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class CodeTests:
    """Tests of one programming problem; `or1.reward.ground_truth` builds them from the formats of data sets.

    kind         "stdin": the program reads inputs[i] and prints outputs[i]
                 "function": `fn_name`, a function or a method of class Solution, is called with the JSON values in the
                 lines of inputs[i] and returns one of the JSON values in the lines of outputs[i]
                 "asserts": `script` asserts the behaviour of the program's names
    inputs       one per test, at least one for "stdin" and "function"
    outputs      as many as inputs
    fn_name      the function under test
    script       Python source with at least one assert statement
    setup        Python source that runs before both the program and the script
    names        names that the script takes from the program; all others are its own, Python's or the setup's
    """

    kind: Literal["stdin", "function", "asserts"]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    fn_name: str = ""
    script: str = ""
    setup: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One problem: `Prompt(id="train.jsonl:17", source="train.jsonl", text="12+7", token_ids=[...], golds=("19",))`.

    golds     equally correct answers of a maths problem
    tests     tests of a programming problem
    row       the columns of the data row as read from the file, for user-defined rewards
    messages  the chat messages behind `text`, for servers that apply the chat template themselves
    """

    id: str
    source: str
    text: str
    token_ids: np.ndarray
    golds: tuple[str, ...] = ()
    tests: CodeTests | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Response:
    """One sampled completion.

    token_ids  i32[L], up to and including the end-of-sequence token if one was sampled
    logp       f32[L], the engine's log-probability of each token at the sampling temperature, nats
    finish     "stop" if the last token is end-of-sequence, "length" if the response was cut at the limit, "deadline" if
               generation was aborted at its deadline; such a response may have no tokens
    version    policy version that sampled its last token
    versions   i32[L], policy version that sampled each token, or None if `version` sampled all of them
    sampled    bool[L], True for tokens of the policy, or None if it sampled all. An environment wrote the others, such
               as results of tools: their `logp` is NaN, and the loss and statistics of tokens leave them out
    """

    token_ids: np.ndarray
    logp: np.ndarray
    finish: str
    version: int
    text: str
    versions: np.ndarray | None = None
    sampled: np.ndarray | None = None

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return len(self.token_ids) if self.sampled is None else int(self.sampled.sum())

    @property
    def unknown_tokens(self) -> int:
        """Number of sampled tokens whose log-probability the engine reported as NaN or infinite."""
        unknown = ~np.isfinite(self.logp)
        return int((unknown if self.sampled is None else unknown & self.sampled).sum())

    @property
    def truncated(self) -> bool:
        """True if the response ended without an end-of-sequence token."""
        return self.finish != "stop"

    @property
    def token_versions(self) -> np.ndarray:
        """Policy version that sampled each token, i32[L]."""
        return np.full(len(self.token_ids), self.version, np.int32) if self.versions is None else self.versions


@dataclass(frozen=True)
class Score:
    """Reward and status of one response. NaN means no reward: the response leaves its group and is not trained on.

    cause  reason of a crash, as text; for a wrong answer, that its gold cannot be verified
    parts  (name, reward) of each of `[[reward.parts]]`, without its weight; NaN for none
    """

    reward: float
    status: Status
    cause: str = field(default="", compare=False)
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Group:
    """All M responses to one prompt with their scores, in sampling order."""

    prompt: Prompt
    responses: tuple[Response, ...]
    scores: tuple[Score, ...]

    @property
    def rewards(self) -> np.ndarray:
        """Rewards, f64[M]; NaN for a response without a reward."""
        return np.array([score.reward for score in self.scores], dtype=np.float64)


@dataclass(frozen=True)
class OpenGroup:
    """Group with unfinished responses that continue under the next policy; those have no score yet."""

    prompt: Prompt
    responses: tuple[Response, ...]
    scores: tuple[Score | None, ...]


@dataclass(frozen=True)
class TrainSequence:
    """One response to train on.

    prompt_ids    i32[Lp]
    response_ids  i32[L]
    rollout_logp  f32[L], the engine's log-probabilities, nats; NaN where unknown
    advantage     advantage of every token of the response
    old_logp      float[L], log-probabilities of the old policy in the ratio; None for an on-policy update
    ref_logp      float[L], log-probabilities of the reference model for the KL term
    weight        importance weight or mask of the whole response, which `advantage` contains already
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logp: np.ndarray
    advantage: float
    old_logp: np.ndarray | None = None
    ref_logp: np.ndarray | None = None
    weight: float = 1.0

    @property
    def packed_tokens(self) -> int:
        """Tokens of this sequence in a packed row."""
        return len(self.prompt_ids) + len(self.response_ids) - 1

    @property
    def trained_tokens(self) -> int:
        """Tokens of the response."""
        return len(self.response_ids)

    @property
    def known_tokens(self) -> int:
        """Tokens that the loss sums over, which are those with a finite log-probability from the engine."""
        return int(np.isfinite(self.rollout_logp).sum())
