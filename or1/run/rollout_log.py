"""rollouts/step_N.parquet: every response of a step with its tokens, reward and advantage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from or1.core.errors import RolloutError
from or1.core.files import replacing
from or1.core.types import Group, Prompt, Response, Score, Status

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

WITH_PARTS = SCHEMA.append(pa.field("parts", pa.string()))
"""The schema with `[[reward.parts]]`: JSON pairs of name and reward without its weight."""
WITH_SAMPLED = WITH_PARTS.append(pa.field("sampled", pa.list_(pa.bool_())))
"""The schema with tokens that an environment wrote: False for these, null for a response without any."""
_SUM = b"or1.sha256"
_REMEDY = "restore that file, or replay a step after a later checkpoint"


def write_rollouts(
    folder: Path, step: int, stage: int, groups: Sequence[Group], advantages: Sequence[np.ndarray | None]
) -> Path:
    """Write one row per response to `folder/step_N.parquet`. Return that path.

    advantages  one entry per group: the advantages of its M responses, or None if the group was rejected

    Raises RolloutError if the run's folder was removed.
    """
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
            "parts": json.dumps(score.parts),
            "finish": response.finish,
            "version": response.version,
            "versions": response.versions,
            "sampled": response.sampled,
            "advantage": None if advantage is None else advantage[i],
            "kept": advantage is not None,
        }
        for group, advantage in zip(groups, advantages, strict=True)
        for i, (response, score) in enumerate(zip(group.responses, group.scores, strict=True))
    ]
    if not folder.parent.is_dir():
        raise RolloutError(
            f"{folder.parent} was removed or renamed while the run was at work; put it back, and the "
            "same command resumes from the newest checkpoint"
        )
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step}.parquet"
    with_parts = any(score.parts for group in groups for score in group.scores)
    with_sampled = any(response.sampled is not None for group in groups for response in group.responses)
    schema = WITH_SAMPLED if with_sampled else WITH_PARTS if with_parts else SCHEMA
    table = pa.Table.from_pylist(rows, schema=schema)
    table = table.replace_schema_metadata({_SUM: _content_sum(table)})
    # Not durable: a power cut costs a file that only `or1 replay` and the report read, an fsync costs every step.
    with replacing(path, durable=False) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
    return path


def read_rollouts(path: Path, step: int, prompts: Mapping[str, Prompt], group_size: int) -> list[Group]:
    """Return the groups that `write_rollouts` wrote; tokens and log-probs are equal bit for bit.

    prompts  prompts by id

    Raises KeyError for a prompt that is not in `prompts`, RolloutError for a file that is damaged or not of `step`.
    """
    groups = []
    for prompt_id, rows in groupby(_read_rows(path, step), key=lambda row: row["prompt_id"]):
        of_prompt = list(rows)
        # Two adjacent groups may have the same prompt.
        for first in range(0, len(of_prompt), group_size):
            members = of_prompt[first : first + group_size]
            responses = tuple(_response(row) for row in members)
            scores = tuple(_score(row) for row in members)
            groups.append(Group(prompts[prompt_id], responses, scores))
    return groups


def _read_rows(path: Path, step: int) -> list[dict[str, Any]]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        whole = (table.schema.metadata or {}).get(_SUM) in (None, _content_sum(table))
        rows: list[dict[str, Any]] | None = table.to_pylist() if whole and _is_known(table.schema) else None
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise RolloutError(f"{path} cannot be read ({type(error).__name__}: {error}); {_REMEDY}") from error
    if rows is None:
        raise RolloutError(f"{path} is not as it was written; {_REMEDY}")
    if others := sorted({row["step"] for row in rows} - {step}):
        raise RolloutError(f"{path} holds the rollouts of step {others[0]}; give the files back their own names")
    return rows


def _is_known(schema: pa.Schema) -> bool:
    return any(schema.equals(known) for known in (SCHEMA, WITH_PARTS, WITH_SAMPLED))


def _score(row: Mapping[str, Any]) -> Score:
    parts = tuple((name, reward) for name, reward in json.loads(row.get("parts", "[]")))
    return Score(row["reward"], Status(row["status"]), parts=parts)


def _content_sum(table: pa.Table) -> bytes:
    """Return the sha256 of a table's content, independent of the layout of a file."""
    digest = hashlib.sha256()
    for name in table.schema.names:
        column = table.column(name).combine_chunks()
        digest.update(f"{name} {len(column)}\n".encode())
        while True:
            digest.update(np.packbits(pc.is_valid(column).to_numpy(zero_copy_only=False)).tobytes())
            if not pa.types.is_list(column.type):
                break
            digest.update(pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).tobytes())
            column = pc.list_flatten(column)
        if pa.types.is_string(column.type):
            column = pc.cast(column, pa.binary())
            digest.update(pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).tobytes())
            for value in column:
                digest.update(value.as_py() or b"")
        else:
            column = pc.cast(column, pa.int8()) if pa.types.is_boolean(column.type) else column
            digest.update(pc.fill_null(column, 0).to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest().encode()


def _response(row: Mapping[str, Any]) -> Response:
    token_ids, logp = np.array(row["token_ids"], np.int32), np.array(row["logp"], np.float32)
    sampled = None if row.get("sampled") is None else np.array(row["sampled"], np.bool_)
    return Response(
        token_ids, logp, finish=row["finish"], version=row["version"], text=row["response"], sampled=sampled
    )
