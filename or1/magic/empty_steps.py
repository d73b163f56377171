"""Warnings about steps in which nothing is trained: the statuses of the responses, and remedies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from or1.config import Config
from or1.core.records import number
from or1.core.types import Group, Status

PATIENCE = 3
"""Empty steps in a row before the first warning; the next follow at 10, 100 and so on."""
_SHOWN = 3
_CHOOSE = (
    "`or1 filter` with data.keep_difficulty keeps the problems that the model solves sometimes",
    "a graded reward, with more values than 0 and 1, also tells responses apart",
)
_REMEDIES = {
    Status.NO_ANSWER: (
        "most responses hold no answer to grade: read some in rollouts/, and ask for the form that the "
        "verifier reads, for example with data.prompt_suffix",
    ),
    Status.TRUNCATED: ("most responses are cut at the limit: raise max_response_tokens of the stage",),
    Status.TIMEOUT: ("most responses take longer to grade than reward.timeout_s: raise it",),
    Status.CRASH: ("grading most responses crashes: mend the reward; the first crashes are told with their causes",),
    Status.SKIPPED: ("the reward function returns None for most responses: let it return a number",),
    Status.WRONG: (
        "if some responses are right, the reward or the answers in the data are not: compare some in rollouts/",
        *_CHOOSE,
    ),
    Status.OK: _CHOOSE,
}


def note_step(totals: Counter[str], groups: Sequence[Group], kept: bool, config: Config) -> str:
    """Count a step. Return a warning if several steps in a row were empty, else "".

    totals  the counts of the run, which are in its checkpoints
    groups  of the step, before rejection; without a complete group the rewards are not known
    kept    True if any group was trained
    """
    totals["empty_steps"] += not kept
    if kept:
        totals["empty_in_a_row"] = 0
    if kept or not groups:
        return ""
    totals["empty_in_a_row"] += 1
    row = totals["empty_in_a_row"]
    if row != PATIENCE and (row < 10 or set(str(row)[1:]) != {"0"} or str(row)[0] != "1"):
        return ""
    statuses = Counter(score.status for group in groups for score in group.scores)
    return (
        f"nothing is trained, {row} steps in a row: {_seen(groups)} ({_shares(statuses)}). "
        f"Remedies: {'; '.join(_remedies(statuses, config))}"
    )


def nothing_trained(records: Sequence[Mapping[str, Any]]) -> str:
    """Return why a run had no update at all, from its lines of metrics.jsonl; "" if it had one, or no step."""
    steps = [record for record in records if number(record.get("step"), 0.0) > 0]
    if not steps or any(number(record.get("optim/updates"), 0.0) for record in steps):
        return ""
    if any(number(record.get("optim/skipped"), 0.0) for record in steps):
        return "nothing was trained: every update was skipped for a loss or gradient that is not finite"
    named = {status: f"reward/status/{status.value}" for status in Status}
    said = _shares({status: math.fsum(number(r.get(key), 0.0) for r in steps) for status, key in named.items()})
    if not said:
        return "nothing was trained: no step had a complete group of responses"
    means = [value for r in steps if math.isfinite(value := number(r.get("reward/mean")))]
    mean = f", mean reward {np.mean(means):.4g}" if means else ""
    return f"nothing was trained: in none of {len(steps):,} steps was a group kept ({said}{mean})"


def _seen(groups: Sequence[Group]) -> str:
    """Return a description of the rewards of groups that were not trained."""
    scored = [group.rewards[~np.isnan(group.rewards)] for group in groups]
    equal = Counter(float(rewards[0]) for rewards in scored if rewards.size and rewards.min() == rewards.max())
    unscored = sum(not rewards.size for rewards in scored)
    other = len(groups) - unscored - equal.total()
    if unscored == len(groups):
        return "no response of any group has a reward"
    if len(equal) == 1 and equal.total() == len(groups):
        return f"every response of every group has reward {next(iter(equal)):g}"
    parts = []
    if equal:
        shown = ", ".join(f"{count:,} with {value:g}" for value, count in equal.most_common(_SHOWN))
        more = ", ..." if len(equal) > _SHOWN else ""
        parts.append(f"within {equal.total():,} of {len(groups):,} groups all rewards are equal ({shown}{more})")
    if unscored:
        parts.append(f"{unscored:,} groups have no reward at all")
    if other:
        parts.append(
            f"{other:,} groups with different rewards were left out for other reasons, such as a log-prob of "
            "the engine that is not finite, or loss.advantage_mask"
        )
    return ", and ".join(parts)


def _shares(counts: Mapping[Status, float]) -> str:
    total = math.fsum(counts.values())
    some = sorted(((n, status.value) for status, n in counts.items() if n > 0), reverse=True)
    return ", ".join(f"{100 * n / total:.3g} % {name}" for n, name in some)


def _remedies(statuses: Counter[Status], config: Config) -> list[str]:
    remedies = list(_REMEDIES[statuses.most_common(1)[0][0]])
    if not config.loss.refill_rounds:
        remedies.append("loss.refill_rounds samples new groups in place of those left out")
    return remedies
