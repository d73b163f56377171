"""One rollout by all ranks: each samples and scores a share of the prompts, and all get all groups.

What a prompt's responses are does not depend on the number of ranks: a sample's random numbers come from its place in
the step, and prompts are dealt out one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from or1 import wire
from or1.dist import World
from or1.reward.base import Scorer
from or1.rollout.base import Engine, Sampling
from or1.rollout.collect import Progress, Rollout, collect, no_progress
from or1.types import Group, Prompt


def collect_spread(
    world: World,
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    progress: Progress = no_progress,
) -> Rollout:
    """`collect` over all ranks: groups in prompt order, equal on every rank; the slowest rank's seconds. Collective."""
    mine = world.share(len(prompts))
    share = replace(sampling, numbers=tuple(mine))
    rollout = collect(engine, scorer, [prompts[p] for p in mine], share, progress)
    if world.size == 1:
        return rollout
    # Prompts stay: every rank has them, and their data rows may hold anything.
    answers = [(group.responses, group.scores) for group in rollout.groups]
    payload = wire.dumps((answers, rollout.generate_s, rollout.reward_s))
    parts = [wire.loads(part) for part in world.gather(payload)]
    dealt = {
        p: Group(prompts[p], *answer)
        for rank, (answers, _, _) in enumerate(parts)
        for p, answer in zip(range(rank, len(prompts), world.size), answers, strict=True)
    }
    slowest = [max(part[i] for part in parts) for i in (1, 2)]
    return Rollout([dealt[p] for p in range(len(prompts))], *slowest)
