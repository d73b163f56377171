"""The transcripts of `or1 eval`: one row a response, and the outcomes that are counted from the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from or1.core.types import Group, Status
from or1.eval.accuracy import Outcome, best_reward, mean_reward
from or1.reward.terms import is_graded, is_solved

TRANSCRIPTS = pa.schema(
    {
        "set": pa.string(),
        "prompt_id": pa.string(),
        "source": pa.string(),
        "prompt": pa.string(),
        "golds": pa.list_(pa.string()),
        "sample": pa.int32(),
        "response": pa.string(),
        "tokens": pa.int32(),
        "reward": pa.float64(),
        "status": pa.string(),
        "finish": pa.string(),
    }
)
"""One row a response. `prompt` is the question as text; `tokens` is the length of the response."""

COUNTED = ("source", "tokens", "reward", "status", "finish")
"""Columns that `outcomes_of` reads."""


def transcript_rows(name: str, group: Group) -> Iterator[dict[str, Any]]:
    """Yield the rows of one problem of the evaluation set `name`, sample by sample."""
    prompt = group.prompt
    for sample, (response, score) in enumerate(zip(group.responses, group.scores, strict=True)):
        yield {
            "set": name,
            "prompt_id": prompt.id,
            "source": prompt.source,
            "prompt": prompt.text,
            "golds": list(prompt.golds),
            "sample": sample,
            "response": response.text,
            "tokens": len(response.token_ids),
            "reward": score.reward,
            "status": score.status.value,
            "finish": response.finish,
        }


def outcomes_of(rows: Sequence[dict[str, Any]], samples: int) -> Iterator[Outcome]:
    """Yield the outcome of each problem. `rows` holds `samples` consecutive rows a problem."""
    for start in range(0, len(rows), samples):
        group = rows[start : start + samples]
        yield Outcome(
            source=group[0]["source"],
            samples=samples,
            correct=sum(is_solved(row["reward"]) for row in group),
            reward=mean_reward([row["reward"] for row in group]),
            tokens=float(np.mean([row["tokens"] for row in group])),
            truncated=sum(row["finish"] != "stop" for row in group),
            statuses=Counter(row["status"] for row in group),
            best=best_reward(row["reward"] for row in group),
            graded=sum(is_graded(row["reward"]) for row in group),
            unclosed=sum(row["status"] == Status.TRUNCATED and row["finish"] == "stop" for row in group),
        )
