"""rollouts/step_N.parquet: every response of a step with its tokens, reward and advantage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from or1.types import Group

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
