"""Every response to every prompt, part by part, so that a run can stop anywhere and go on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from or1.config import Config
from or1.offline.store import PartStore
from or1.reward.base import Scorer
from or1.rollout.base import Engine, Sampling
from or1.rollout.collect import Progress, collect
from or1.types import Group, Prompt

_BATCHES = 4
"""Batches in a part where the engine keeps its own queue: a part ends with its longest response, most slots empty."""


def part_size(config: Config, engine: Engine, samples: int) -> int:
    """Prompts per part: about one batch of transformers' generate, some batches of an engine with a queue."""
    if config.endpoint.url is not None:
        return max(1, _BATCHES * config.endpoint.concurrency // samples)
    from or1.rollout.hf import HfEngine

    batches = 1 if isinstance(engine, HfEngine) else _BATCHES
    return max(1, batches * config.rollout.batch_size // samples)


def sample_parts(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    store: PartStore,
    *,
    rows_of: Callable[[Group], Iterable[dict[str, Any]]],
    progress: Progress,
) -> None:
    """Fill `store` with `rows_of` every group. Parts that it has are not sampled again.

    Each part has its own seed and always the same prompts, so a run that was killed ends with the samples of one that
    was not, as far as the engine repeats itself under a seed.
    """
    total = len(prompts) * sampling.samples
    for index, start in enumerate(range(0, len(prompts), store.size)):
        part = prompts[start : start + store.size]
        before = start * sampling.samples
        if index not in store:
            seed = int(np.random.SeedSequence([sampling.seed, index]).generate_state(1, np.uint64)[0] >> 1)

            def shown(done: int, _: int, before: int = before) -> None:
                progress(before + done, total)

            groups = collect(engine, scorer, part, replace(sampling, seed=seed), shown).groups
            store.write(index, [row for group in groups for row in rows_of(group)])
        progress(before + len(part) * sampling.samples, total)


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """sha256 of everything about the prompts that their responses and scores depend on."""
    digest = hashlib.sha256()
    for prompt in prompts:
        for part in (prompt.id, prompt.text, repr(prompt.golds), repr(prompt.tests)):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(prompt.token_ids.tobytes())
    return digest.hexdigest()
