"""Definitions of the words about rewards in reports, tables and messages.

solved       a reward of at least RIGHT; used by accuracy, pass@k, `data.drop_solved` and the tags of transcripts
rewarded     the status "ok": a right answer, or a reward above 0 from a function, solved or not
partial      a reward between 0 and RIGHT
truncated    cut at the token limit or the deadline, for any reward
no </think>  ended without `</think>`, which `reward.require_think_close` scores 0; on disk the status is "truncated".
unverifiable said of a problem whose gold answer the maths verifier cannot read
graded       a reward other than 0 and 1. One such reward makes a run or an evaluation graded: reports then show the
             mean reward before the accuracy
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from or1.core.records import Record, number
from or1.core.types import Group, Response, Score, Status

RIGHT = 1.0
"""Least reward of a solved response. A program that passes half of its tests is not solved."""

UNVERIFIABLE = "the gold answer cannot be verified"
"""`Score.cause` of a wrong answer whose gold has no value that is equal to itself."""

NO_THINK_CLOSE = "no </think>"
_WORDS: dict[str, str] = {Status.OK: "rewarded", Status.NO_ANSWER: "no answer", Status.SKIPPED: "no reward"}
_UNSCORED = (Status.TIMEOUT, Status.CRASH, Status.SKIPPED)
_GRADED_KEY = re.compile(r"eval/[^/]+/graded")


def is_solved(reward: object) -> bool:
    """Return whether a reward counts as solved; a missing one (NaN or None) does not."""
    return isinstance(reward, int | float) and reward >= RIGHT


def is_graded(reward: float) -> bool:
    """Return whether a reward is neither 0 nor 1; a missing one (NaN) is not graded."""
    return not (reward in (0.0, 1.0) or math.isnan(reward))


def is_unclosed(response: Response, score: Score) -> bool:
    """Return whether a response ended by itself but was scored as truncated because `</think>` is missing."""
    return score.status is Status.TRUNCATED and not response.truncated


def unverifiable_groups(groups: Iterable[Group]) -> list[Group]:
    """Return the groups in which an answer was compared with a gold that cannot be verified."""
    return [group for group in groups if any(score.cause == UNVERIFIABLE for score in group.scores)]


def status_word(status: str, finish: str = "") -> str:
    """Return a status in words. finish: "stop" marks a truncated response as one without `</think>`."""
    if status == Status.TRUNCATED and finish == "stop":
        return NO_THINK_CLOSE
    return _WORDS.get(status, str(status))


def graded_run(records: Iterable[Record]) -> bool:
    """Return whether any record of a metrics.jsonl has a graded reward, in a rollout or in an evaluation."""
    return any(_graded_record(record) for record in records)


def no_think_close(record: Record) -> float:
    """Return the share of a step's responses that were scored 0 because they ended without `</think>`."""
    # Runs older than this metric graded no truncated response, or had no response without </think>.
    old = number(record.get("reward/status/truncated"), 0.0) - number(record.get("completion/truncated"), 0.0)
    return number(record.get("completion/no_think_close"), max(0.0, old))


def _graded_record(record: Record) -> bool:
    shares = [value for key, value in record.items() if key == "reward/graded" or _GRADED_KEY.fullmatch(key)]
    if any(number(value) > 0 for value in shares):
        return True
    return "reward/graded" not in record and _graded_by_mean(record)


def _graded_by_mean(record: Record) -> bool:
    """Detect graded rewards in records older than reward/graded: the mean then differs from the share of status ok."""
    mean, share = number(record.get("reward/mean")), number(record.get("reward/status/ok"))
    # A crash is a reward of 0 in a built-in verifier and no reward in a function, so the mean is no evidence then.
    lost = any(number(record.get(f"reward/status/{status.value}"), 0.0) for status in _UNSCORED)
    return not lost and abs(mean - share) > 1e-9
