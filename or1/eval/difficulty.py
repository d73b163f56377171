"""How often a model solves each training prompt (model-aware difficulty; Skywork-OR1 report, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from or1.config import Config
from or1.core.display import Display
from or1.core.types import Group, Status
from or1.data import duplicate_lines, load_training_files, times_solved
from or1.eval.accuracy import Outcome
from or1.eval.sampling import part_size, reuse_message, sample_parts, score_inputs
from or1.eval.source import open_source
from or1.eval.store import PartStore, move_aside
from or1.reward import make_scorer
from or1.reward.scorers import remarks_of
from or1.rollout.engine import Sampling

DIFFICULTY = pa.schema(
    {
        "prompt_id": pa.string(),
        "source": pa.string(),
        "prompt": pa.string(),
        "samples": pa.int32(),
        "passes": pa.int32(),
        "pass_rate": pa.float64(),
        "truncated": pa.int32(),
        "no_answer": pa.int32(),
        "failed": pa.int32(),
        "tokens_mean": pa.float64(),
    }
)
"""One row a prompt. `passes` of `samples` responses were right; `failed` ones timed out or crashed the verifier."""


@dataclass(frozen=True, kw_only=True)
class DifficultyCounts:
    """Counts over all prompts.

    solved     solved[c] is the number of prompts that were solved c times, c = 0 ... samples
    responses  number of responses
    truncated  responses cut at the token limit
    failed     responses that timed out or crashed the verifier
    """

    solved: list[int]
    responses: int
    truncated: int
    failed: int


def measure_difficulty(config: Config, out: Path, display: Display, fresh: bool = False) -> DifficultyCounts:
    """Sample every prompt of `[data]` filter.samples times, and write one row a prompt to the parquet file `out`.

    Finished parts are kept in the folder `out`.parts, from which the same command resumes.
    Raises DataError, StoreError, ModelError, EndpointError, ScorerError.
    """
    parts = out.with_name(f"{out.name}.parts")
    settings = config.filter
    with open_source(config) as source:
        if fresh and (message := move_aside(parts)):
            display.message(message)
        loaded = load_training_files(config, source.tokenizer)
        for line in [*(line for report in loaded.reports for line in report.lines()), *duplicate_lines(loaded.prompts)]:
            display.message(line)
        # A file that is listed twice, to count twice in training, is measured once.
        prompts = list({prompt.id: prompt for prompt in loaded.prompts}.values())
        limit = config.filter_max_response_tokens
        depends_on = {
            "model": source.model,
            "samples": settings.samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_response_tokens": limit,
            "seed": config.seed,
            **score_inputs(config, prompts),
        }
        store = PartStore(
            parts, out, settings=depends_on, schema=DIFFICULTY, size=part_size(config, source.engine, settings.samples)
        )
        sampling = Sampling(settings.temperature, limit, settings.samples, config.seed, top_p=settings.top_p)
        with make_scorer(config.reward, prompts, out.parent) as scorer:
            for remark in remarks_of(scorer, out.parent):
                display.message(remark)
            reused = sample_parts(
                source.engine,
                scorer,
                prompts,
                sampling,
                store,
                rows_of=difficulty_rows,
                progress=display.progress("filter"),
            )
        if line := reuse_message("filter", reused, len(prompts) * settings.samples):
            display.message(line)
    store.merge()
    return _counts(store, settings.samples)


def difficulty_rows(group: Group) -> Iterator[dict[str, Any]]:
    """Yield the one row of a prompt."""
    outcome = Outcome.of(group)
    statuses = outcome.statuses
    yield {
        "prompt_id": group.prompt.id,
        "source": outcome.source,
        "prompt": group.prompt.text,
        "samples": outcome.samples,
        "passes": outcome.correct,
        "pass_rate": outcome.correct / outcome.samples,
        "truncated": outcome.truncated,
        "no_answer": statuses.get(Status.NO_ANSWER.value, 0),
        "failed": statuses.get(Status.TIMEOUT.value, 0) + statuses.get(Status.CRASH.value, 0),
        "tokens_mean": outcome.tokens,
    }


def _counts(store: PartStore, samples: int) -> DifficultyCounts:
    columns = ("prompt", "passes", "truncated", "failed")
    table = pa.concat_tables(store.tables(columns))
    texts = table["prompt"].to_pylist()
    passes, truncated, failed = (table[name].to_numpy() for name in columns[1:])
    # Counted as data.difficulty_file is read, so that training keeps the same prompts.
    solved = times_solved(zip(texts, passes.tolist(), [samples] * len(texts), strict=True))
    return DifficultyCounts(
        solved=np.bincount([solved[text] for text in texts], minlength=samples + 1).tolist(),
        responses=len(passes) * samples,
        truncated=int(truncated.sum()),
        failed=int(failed.sum()),
    )
