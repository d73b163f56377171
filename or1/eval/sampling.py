"""Sampling of many prompts in parts, so that a killed command resumes with the part that it was sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from or1.config import Config
from or1.core.seeds import seed_of
from or1.core.types import Group, Prompt
from or1.data.fingerprint import fingerprint
from or1.eval.store import PartStore
from or1.reward.custom import file_of
from or1.reward.scorer import Scorer
from or1.rollout.collect import Progress, collect
from or1.rollout.engine import Engine, Sampling

_BATCHES = 4
"""Batches in a part with continuous batching, to amortize the end of a part, when only long responses still run."""


def part_size(config: Config, engine: Engine, samples: int) -> int:
    """Return the prompts per part: about one batch without continuous batching, some batches with it."""
    if config.endpoint.url is not None:
        return max(1, _BATCHES * config.endpoint.concurrency // samples)
    batches = _BATCHES if engine.continuous_batching else 1
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
) -> int:
    """Fill `store` with `rows_of` every group, and return the number of responses that are reused.

    Finished parts are reused. Each part has its own seed and always the same prompts. So a resumed command gives the
    same samples as an uninterrupted one, if the engine is deterministic under a seed.
    """
    total, reused = len(prompts) * sampling.samples, 0
    for index, start in enumerate(range(0, len(prompts), store.size)):
        part = prompts[start : start + store.size]
        before = start * sampling.samples
        if index in store:
            reused += len(part) * sampling.samples
        else:
            seeded = replace(sampling, seed=seed_of(sampling.seed, index))
            groups = collect(engine, scorer, part, seeded, _from(before, total, progress)).groups
            store.write(index, [row for group in groups for row in rows_of(group)])
        progress(before + len(part) * sampling.samples, total)
    return reused


def _from(before: int, total: int, progress: Progress) -> Progress:
    """Return the progress of a part that `before` of `total` responses precede."""

    def show(done: int, _: int) -> None:
        progress(before + done, total)

    return show


def reuse_message(name: str, reused: int, total: int) -> str:
    """Return a line with the number of reused responses; empty if there is none."""
    return f"{name}: {reused:,} of {total:,} responses were there already" if reused else ""


def score_inputs(config: Config, prompts: Iterable[Prompt]) -> dict[str, Any]:
    """Return what the scores depend on apart from sampling, as settings of a PartStore.

    These are the prompts, the settings of `[reward]`, and the file of a user-defined reward function. Modules that
    the file imports are not included.
    """
    reward = config.reward
    files = [file for file in map(file_of, reward.functions) if file is not None]
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return {
        "problems": fingerprint(prompts, bool(reward.functions)),
        "reward": reward.model_dump(mode="json", exclude={"workers"}),
        "reward_file": " ".join(sums) or None,
    }
