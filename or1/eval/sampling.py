"""Every response to every prompt, part by part, so that a run can stop anywhere and go on."""

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
    """Fill `store` with `rows_of` every group; returns how many responses were there. Their parts stay as they are.

    Each part has its own seed and always the same prompts, so a run that was killed ends with the samples of one that
    was not, as far as the engine repeats itself under a seed.
    """
    total, there = len(prompts) * sampling.samples, 0
    for index, start in enumerate(range(0, len(prompts), store.size)):
        part = prompts[start : start + store.size]
        before = start * sampling.samples
        if index in store:
            there += len(part) * sampling.samples
        else:
            seed = seed_of(sampling.seed, index)

            def shown(done: int, _: int, before: int = before) -> None:
                progress(before + done, total)

            groups = collect(engine, scorer, part, replace(sampling, seed=seed), shown).groups
            store.write(index, [row for group in groups for row in rows_of(group)])
        progress(before + len(part) * sampling.samples, total)
    return there


def there_already(name: str, there: int, total: int) -> str:
    """The line that says that old results are used; empty if there are none."""
    return f"{name}: {there:,} of {total:,} responses were there already" if there else ""


def inputs_of(config: Config, prompts: Iterable[Prompt]) -> dict[str, Any]:
    """What the scores of the prompts depend on beside how responses are sampled, for the settings of a PartStore.

    Of a function of the user's own that is its file too, but not what that file imports.
    """
    reward = config.reward
    file = file_of(reward.kind) if reward.is_function else None
    return {
        "problems": fingerprint(prompts, reward.is_function),
        "reward": reward.model_dump(mode="json", exclude={"workers"}),
        "reward_file": None if file is None else hashlib.sha256(file.read_bytes()).hexdigest(),
    }
