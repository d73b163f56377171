"""What an episode leaves: one training sequence with its mask, and its score.

verifiers stores a conversation as a graph of messages. A branch is a path from the first message to the last. It has
the tokens that the model saw and sampled, in order, so nothing is encoded a second time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from or1.core.types import Response, Score, Status


class Trained(NamedTuple):
    """Tokens after the prompt.

    token_ids  i32[L]
    logp       f32[L], the engine's log-probs in nats; NaN where the environment wrote
    sampled    bool[L], True for tokens of the policy
    finish     "stop", or "length" if the last completion was cut
    """

    token_ids: np.ndarray
    logp: np.ndarray
    sampled: np.ndarray
    finish: str


NOTHING = Trained(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.bool_), "length")


class Unusable(ValueError):
    """An episode that is not one training sequence. The message says why."""


def sequence_of(episode: Any, prompt_ids: np.ndarray) -> Trained:
    """Return the trained sequence of verifiers' `Episode`, without its prompt.

    prompt_ids  i32[Lp], with which the first request began

    Raises Unusable for several trained agents, a rewritten history, or another prompt.
    """
    traces = [trace for trace in episode.traces if trace.agent.trainable]
    if len(traces) != 1:
        raise Unusable(f"the episode has {len(traces)} trained agents; or1 trains one, so set trainable of the others")
    branches = [branch for branch in traces[0].branches if branch.trainable]
    if len(branches) != 1:
        raise Unusable(
            f"the conversation has {len(branches)} branches instead of 1, so a later request did not begin with the "
            "tokens of the earlier; choose a renderer that extends conversations (environment.renderer)"
        )
    (branch,) = branches
    ids = np.array(branch.token_ids, np.int32)
    sampled = np.array(branch.sampled_mask, np.bool_)
    start = len(prompt_ids)
    if not np.array_equal(ids[:start], prompt_ids) or sampled[:start].any():
        raise Unusable("the first request does not begin with the prompt of its task")
    logp = np.where(sampled, np.array(branch.logprobs, np.float32), np.float32(np.nan))
    finish = "length" if branch.calls and branch.calls[-1].finish_reason == "length" else "stop"
    return Trained(ids[start:], logp[start:], sampled[start:], finish)


def response_of(sequence: Trained, version: int, tokenizer: Any) -> Response:
    """Return a response, with the text of the whole conversation after the prompt."""
    text = str(tokenizer.decode(sequence.token_ids.tolist(), skip_special_tokens=True))
    # None where nothing is masked, so that a single turn is a response like any other.
    sampled = None if sequence.sampled.all() else sequence.sampled
    return Response(sequence.token_ids, sequence.logp, sequence.finish, version, text, sampled=sampled)


def score_of(episode: Any) -> Score:
    """Return the reward of the trained agent: the sum of weight * score, with the scores as parts."""
    rewards = next(trace for trace in episode.traces if trace.agent.trainable).rewards
    parts = tuple((name, math.nan if each is None else float(each.score)) for name, each in rewards.items())
    if not parts:
        return Score(math.nan, Status.SKIPPED)
    total = math.fsum(each.score * each.weight for each in rewards.values() if each is not None)
    if not math.isfinite(total):
        return Score(math.nan, Status.CRASH, f"the environment's reward is {total}", parts=parts)
    return Score(total, Status.OK if total > 0 else Status.WRONG, parts=parts)


def failure_of(episode: Any) -> Score:
    """Return the score of an episode that failed: no reward, and the first error as the cause."""
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    timed_out = episode.is_timeout or any(trace.is_timeout for trace in episode.traces)
    cause = f"{errors[0].type}: {errors[0].message}" if errors else "the episode failed without an error"
    return Score(math.nan, Status.TIMEOUT if timed_out else Status.CRASH, cause)
