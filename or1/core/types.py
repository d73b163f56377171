"""The data that flows through a step. Arrays are numpy on the host; torch begins at `or1.model.rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np


class Status(StrEnum):
    """What became of scoring one response; every value is counted by name.

    OK         right, or, for a reward of the user's own, above 0
    WRONG      wrong, or not above 0
    NO_ANSWER  nothing in it to grade
    TRUNCATED  cut at the token limit, or never out of its thoughts
    TIMEOUT    grading it took too long
    CRASH      grading it failed
    SKIPPED    the user's reward gave None: it has no reward
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
    """The tests of one programming problem; `or1.reward.ground_truth` makes them from what data sets hold.

    kind         "stdin": the program reads inputs[i] and prints outputs[i]
                 "function": `fn_name`, a function or a method of class Solution, called with the JSON values in the
                 lines of inputs[i], returns one of the JSON values in the lines of outputs[i]
                 "asserts": `script` asserts what the program's names must do
    inputs       one per test; as many outputs; never none
    fn_name      the function under test
    script       Python source with at least one assert statement
    setup        Python source that comes before both the program and the script
    names        what the script takes from the program; every other name is its own, Python's or the setup's
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

    golds     equally good answers of a maths problem
    tests     of a programming problem
    row       the columns of the data row as they were read, for rewards that users bring
    messages  the same as `text` in roles, for servers that apply the chat template themselves
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
               it was aborted because time was up; such a response may have no token at all
    version    policy version that sampled its last token
    versions   i32[L], policy version that sampled each token, or None where `version` sampled all of them
    """

    token_ids: np.ndarray
    logp: np.ndarray
    finish: str
    version: int
    text: str
    versions: np.ndarray | None = None

    @property
    def truncated(self) -> bool:
        """Whether the response was cut before its end-of-sequence token."""
        return self.finish != "stop"

    @property
    def token_versions(self) -> np.ndarray:
        """i32[L]: the policy version behind each token."""
        return np.full(len(self.token_ids), self.version, np.int32) if self.versions is None else self.versions


@dataclass(frozen=True)
class Score:
    """Reward of one response and why. A reward of NaN is none: the response is left out of its group.

    cause  of a crash, for a person
    """

    reward: float
    status: Status
    cause: str = field(default="", compare=False)


@dataclass(frozen=True)
class Group:
    """The M responses to one prompt with their scores, in sampling order."""

    prompt: Prompt
    responses: tuple[Response, ...]
    scores: tuple[Score, ...]

    @property
    def rewards(self) -> np.ndarray:
        """f64[M]; NaN where a response has no reward"""
        return np.array([score.reward for score in self.scores], dtype=np.float64)


@dataclass(frozen=True)
class OpenGroup:
    """A group some of whose responses are to go on under the next policy; those have no score yet."""

    prompt: Prompt
    responses: tuple[Response, ...]
    scores: tuple[Score | None, ...]


@dataclass(frozen=True)
class TrainSequence:
    """One response to train on: `prompt_ids` i32[Lp], `response_ids` i32[L], `rollout_logp` f32[L], its advantage.

    `old_logp` float[L] is what the ratio compares with; None when the update is on-policy. `ref_logp` float[L] is the
    reference model's, which the KL term reads.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logp: np.ndarray
    advantage: float
    old_logp: np.ndarray | None = None
    ref_logp: np.ndarray | None = None

    @property
    def packed_tokens(self) -> int:
        """Tokens this sequence takes in a packed row."""
        return len(self.prompt_ids) + len(self.response_ids) - 1

    @property
    def trained_tokens(self) -> int:
        """Tokens of the response."""
        return len(self.response_ids)

    @property
    def known_tokens(self) -> int:
        """Tokens that the loss sums over: those of which the engine reported a finite log-probability."""
        return int(np.isfinite(self.rollout_logp).sum())
