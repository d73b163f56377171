"""rollouts/step_N.parquet: every response of a step with its tokens, reward and advantage; written and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from or1.types import Group, Prompt, Response, Score, Status

SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "stage": pa.int32(),
        "prompt_id": pa.string(),
        "source": pa.string(),
        "prompt": pa.string(),
        "golds": pa.list_(pa.string()),
        "response": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "logp": pa.list_(pa.float32()),
        "reward": pa.float64(),
        "status": pa.string(),
        "finish": pa.string(),
        "version": pa.int32(),
        "versions": pa.list_(pa.int32()),
        "advantage": pa.float64(),
        "kept": pa.bool_(),
    }
)


def write_rollouts(
    folder: Path, step: int, stage: int, groups: Sequence[Group], advantages: Sequence[Sequence[float] | None]
) -> Path:
    """Write one row a response. `advantages` has one entry a group: its M advantages, or None if it was rejected."""
    rows = [
        {
            "step": step,
            "stage": stage,
            "prompt_id": group.prompt.id,
            "source": group.prompt.source,
            "prompt": group.prompt.text,
            "golds": list(group.prompt.golds),
            "response": response.text,
            "token_ids": response.token_ids,
            "logp": response.logp,
            "reward": score.reward,
            "status": score.status.value,
            "finish": response.finish,
            "version": response.version,
            "versions": response.versions,
            "advantage": None if advantage is None else advantage[i],
            "kept": advantage is not None,
        }
        for group, advantage in zip(groups, advantages, strict=True)
        for i, (response, score) in enumerate(zip(group.responses, group.scores, strict=True))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step}.parquet"
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial, compression="zstd")
    partial.replace(path)
    return path


def read_rollouts(path: Path, prompts: Mapping[str, Prompt], group_size: int) -> list[Group]:
    """The groups that `write_rollouts` wrote, their tokens and log-probs bit for bit.

    `prompts` by id. Raises KeyError for a prompt that is not among them.
    """
    groups = []
    for prompt_id, rows in groupby(pq.read_table(path).to_pylist(), key=lambda row: row["prompt_id"]):
        of_prompt = list(rows)
        # A prompt that came twice in a row made two groups.
        for first in range(0, len(of_prompt), group_size):
            members = of_prompt[first : first + group_size]
            responses = tuple(_response(row) for row in members)
            scores = tuple(Score(row["reward"], Status(row["status"])) for row in members)
            groups.append(Group(prompts[prompt_id], responses, scores))
    return groups


def _response(row: Mapping[str, object]) -> Response:
    token_ids, logp = np.array(row["token_ids"], np.int32), np.array(row["logp"], np.float32)
    return Response(token_ids, logp, row["finish"], row["version"], row["response"])
