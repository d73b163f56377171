"""Metrics of a rollout by the source of its prompts: a data file, or the name in the column `data_source`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from or1.core.types import Group, Prompt
from or1.magic.entropy import rollout_entropy

MOST_SOURCES = 16
"""Sources with metrics of their own. Rows may name thousands, and each is a column of every record."""
OTHERS = "others"
_LONGEST = 60


class Sources:
    """The sources of a run's prompts, with names that fit into names of metrics.

    The MOST_SOURCES sources with the most prompts have their own metrics; all others together are OTHERS. A run with
    one source has none, since they would repeat the metrics of the step.
    """

    def __init__(self, prompts: Iterable[Prompt]):
        counts = Counter(prompt.source for prompt in prompts)
        largest = sorted(counts, key=lambda source: (-counts[source], source))[:MOST_SOURCES]
        self._names = {source: _plain(source) for source in largest} if len(counts) > 1 else {}

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the metrics of one step's groups; a source without a group in the step has none.

        source/NAME/reward     mean reward
        source/NAME/entropy    mean of -log p over the sampled tokens, nats; absent if no token has a finite one
        source/NAME/len_mean   mean tokens of a response
        source/NAME/truncated  share of responses that were cut
        """
        found: dict[str, list[Group]] = {}
        for group in groups if self._names else ():
            found.setdefault(self._names.get(group.prompt.source, OTHERS), []).append(group)
        values = {f"source/{name}/{key}": v for name, own in sorted(found.items()) for key, v in _of_one(own).items()}
        return {name: value for name, value in values.items() if math.isfinite(value)}


def complete_reward(groups: Sequence[Group]) -> dict[str, float]:
    """Return the mean reward of responses that were not cut, as reward/mean_complete; {} if there is none.

    The mean over all responses falls when more are cut, whatever the others are worth.
    """
    pairs = [pair for group in groups for pair in zip(group.responses, group.scores, strict=True)]
    rewards = [score.reward for response, score in pairs if not response.truncated and not math.isnan(score.reward)]
    return {"reward/mean_complete": float(np.mean(rewards))} if rewards else {}


def _of_one(groups: Sequence[Group]) -> dict[str, float]:
    responses = [response for group in groups for response in group.responses]
    rewards = np.concatenate([group.rewards for group in groups])
    given = rewards[~np.isnan(rewards)]
    return {
        "reward": float(given.mean()) if given.size else math.nan,
        "entropy": rollout_entropy(groups),
        "len_mean": float(np.mean([len(response.token_ids) for response in responses])),
        "truncated": float(np.mean([response.truncated for response in responses])),
    }


def _plain(source: str) -> str:
    """Return a source's name without what separates metrics and what a terminal would obey."""
    return re.sub(r"[^\w.+=:-]+", "_", source)[-_LONGEST:] or "unnamed"
