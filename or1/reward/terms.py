"""What the words about rewards mean, everywhere that a person reads them.

solved     a reward of at least RIGHT: counted by accuracy, pass@k, `data.drop_solved` and the tags of transcripts
rewarded   the status "ok": right, or a reward above 0 from a function, solved or not
partial    a reward between 0 and RIGHT
truncated  cut at the token limit or the deadline, whatever its reward
no </think>  ended by itself but never left its thoughts, which `reward.require_think_close` scores 0; on disk such a
           response has the status "truncated" too
graded     a reward that is neither 0 nor 1. One such reward makes a run or an evaluation graded: its mean reward is
           then shown first, and its accuracy after it
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from or1.core.records import Record, number
from or1.core.types import Response, Score, Status

RIGHT = 1.0
"""A response is solved from this reward on, so that a program that passes half of its tests is not."""

NO_THINK_CLOSE = "no </think>"
_WORDS = {Status.OK: "rewarded", Status.NO_ANSWER: "no answer", Status.SKIPPED: "no reward"}
_UNSCORED = (Status.TIMEOUT, Status.CRASH, Status.SKIPPED)
_GRADED_KEY = re.compile(r"eval/[^/]+/graded")


def is_solved(reward: object) -> bool:
    """Return whether a reward counts as solved; a missing one (NaN or None) does not."""
    return isinstance(reward, int | float) and reward >= RIGHT


def is_graded(reward: float) -> bool:
    """Return whether a reward is neither 0 nor 1; a missing one (NaN) is not graded."""
    return not (reward in (0.0, 1.0) or math.isnan(reward))


def is_unclosed(response: Response, score: Score) -> bool:
    """Return whether a response was scored as truncated for want of `</think>`, though it ended by itself."""
    return score.status is Status.TRUNCATED and not response.truncated


def status_word(status: str, finish: str = "") -> str:
    """A status for a person; `finish` tells a response that was cut from one without `</think>`."""
    if status == Status.TRUNCATED and finish == "stop":
        return NO_THINK_CLOSE
    return _WORDS.get(status, str(status))


def graded_run(records: Iterable[Record]) -> bool:
    """Return whether any reward in the records of a metrics.jsonl was graded, in a rollout or in an evaluation."""
    return any(_graded_record(record) for record in records)


def no_think_close(record: Record) -> float:
    """Return the share of a step's responses that ended without `</think>` and were scored 0 for that."""
    # A run from before that metric graded no truncated response, or had no response without </think>.
    old = number(record.get("reward/status/truncated"), 0.0) - number(record.get("completion/truncated"), 0.0)
    return number(record.get("completion/no_think_close"), max(0.0, old))


def _graded_record(record: Record) -> bool:
    shares = [value for key, value in record.items() if key == "reward/graded" or _GRADED_KEY.fullmatch(key)]
    if any(number(value) > 0 for value in shares):
        return True
    return "reward/graded" not in record and _graded_by_mean(record)


def _graded_by_mean(record: Record) -> bool:
    """For records from before reward/graded: the mean of rewards of 0 and 1 is the share of the status ok."""
    mean, share = number(record.get("reward/mean")), number(record.get("reward/status/ok"))
    # A crash is a reward of 0 for a built-in verifier and none for a function, so the mean says nothing then.
    lost = any(number(record.get(f"reward/status/{status.value}"), 0.0) for status in _UNSCORED)
    return not lost and abs(mean - share) > 1e-9
