"""`or1 filter`: how often a model solves each training prompt (model-aware difficulty; report, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from or1.config import Config
from or1.core.quiet import quiet_libraries
from or1.core.types import Group, Status
from or1.data import duplicate_lines, load_training_files, times_solved
from or1.eval.accuracy import Outcome
from or1.eval.sampling import inputs_of, part_size, sample_parts, there_already
from or1.eval.source import open_source
from or1.eval.store import PartStore, move_aside
from or1.report.progress import Bar
from or1.report.tables import print_difficulty
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


def run_filter(config: Config, out: Path | None = None, fresh: bool = False) -> Path:
    """Sample every prompt of `[data]` filter.samples times and write the counts to `out`; returns its path.

    out  default: difficulty.parquet in the run directory. Parts stand in a folder beside it, so that the same command
         goes on where it was stopped.

    Raises DataError, StoreError, ModelError, EndpointError, ScorerError.
    """
    quiet_libraries()
    out = out or config.run_path / "difficulty.parquet"
    parts = out.with_name(f"{out.name}.parts")
    settings = config.filter
    with Bar() as bar, open_source(config) as source:
        if fresh and (message := move_aside(parts)):
            bar.message(message)
        loaded = load_training_files(config, source.tokenizer)
        for line in [*(line for report in loaded.reports for line in report.lines()), *duplicate_lines(loaded.prompts)]:
            bar.message(line)
        # A file that is named twice to count twice need be measured once only.
        prompts = list({prompt.id: prompt for prompt in loaded.prompts}.values())
        limit = config.filter_max_response_tokens
        depends_on = {
            "model": source.model,
            "samples": settings.samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_response_tokens": limit,
            "seed": config.seed,
            **inputs_of(config, prompts),
        }
        store = PartStore(parts, out, depends_on, DIFFICULTY, part_size(config, source.engine, settings.samples))
        sampling = Sampling(settings.temperature, limit, settings.samples, config.seed, top_p=settings.top_p)

        def progress(done: int, total: int) -> None:
            bar.show("filter", done, total)

        with make_scorer(config.reward, prompts, out.parent) as scorer:
            for remark in remarks_of(scorer, out.parent):
                bar.message(remark)
            there = sample_parts(source.engine, scorer, prompts, sampling, store, rows_of=_rows, progress=progress)
        if line := there_already("filter", there, len(prompts) * settings.samples):
            bar.message(line)
    store.merge()
    _summarise(config, store, out)
    return out


def _rows(group: Group) -> Iterator[dict[str, Any]]:
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


def _summarise(config: Config, store: PartStore, out: Path) -> None:
    columns = ("prompt", "passes", "truncated", "failed")
    table = pa.concat_tables(store.tables(columns))
    texts = table["prompt"].to_pylist()
    passes, truncated, failed = (table[name].to_numpy() for name in columns[1:])
    samples = config.filter.samples
    # As data.difficulty_file is read, so that what is kept here and in training agrees.
    solved = times_solved(zip(texts, passes.tolist(), [samples] * len(texts), strict=True))
    counts = np.bincount([solved[text] for text in texts], minlength=samples + 1).tolist()
    total = len(passes) * samples
    lines = [
        f"  {truncated.sum():,} of {total:,} responses truncated, {failed.sum():,} timed out or crashed the verifier",
        f"results: {out}",
        f'use it with: [data] difficulty_file = "{out}", keep_difficulty = [1, {samples - 1}]',
    ]
    print_difficulty(counts, config.data.keep_difficulty, lines)
