"""One rollout by all ranks: each samples and scores a share of the prompts, and all get all groups.

What a prompt's responses are does not depend on the number of ranks: a sample's random numbers come from its place in
the step, and prompts are dealt out one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from or1.core import codec as wire
from or1.core.types import Group, OpenGroup, Prompt
from or1.dist.world import World
from or1.reward.scorer import Scorer
from or1.rollout.collect import Progress, Rollout, collect, no_progress
from or1.rollout.engine import Engine, Sampling


def collect_spread(
    world: World,
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    progress: Progress = no_progress,
) -> Rollout:
    """`collect` over all ranks: groups in prompt order, equal on every rank; the slowest rank's seconds. Collective."""
    return exchange(world, collect_share(world, engine, scorer, prompts, sampling, progress=progress), prompts, ())


def collect_share(
    world: World,
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    carried: Sequence[OpenGroup] = (),
    progress: Progress = no_progress,
) -> Rollout:
    """`collect` for the groups and prompts of this rank. Not collective, except for what the engine does."""
    mine = world.share(len(carried) + len(prompts))
    return collect(
        engine,
        scorer,
        [prompts[i - len(carried)] for i in mine if i >= len(carried)],
        replace(sampling, numbers=tuple(mine)),
        progress,
        carried=[carried[i] for i in mine if i < len(carried)],
    )


def exchange(world: World, share: Rollout, prompts: Sequence[Prompt], carried: Sequence[OpenGroup]) -> Rollout:
    """The whole rollout from every rank's share. Collective."""
    if world.size == 1:
        return share
    all_prompts = [group.prompt for group in carried] + list(prompts)
    # Prompts stay: every rank has them, and their data rows may hold anything.
    parts = _by_index(share, [(i, all_prompts[i]) for i in world.share(len(all_prompts))])
    found = [wire.loads(data) for data in world.gather(wire.dumps((parts, share.generate_s, share.reward_s)))]
    groups: dict[int, Group] = {}
    still_open: dict[int, OpenGroup] = {}
    for index, closed, responses, scores in (part for parts, _, _ in found for part in parts):
        if closed:
            groups[index] = Group(all_prompts[index], responses, scores)
        else:
            still_open[index] = OpenGroup(all_prompts[index], responses, scores)
    slowest = [max(rank[i] for rank in found) for i in (1, 2)]
    return Rollout([groups[i] for i in sorted(groups)], *slowest, [still_open[i] for i in sorted(still_open)])


def _by_index(share: Rollout, mine: Sequence[tuple[int, Prompt]]) -> list[tuple]:
    """(index, whether closed, responses, scores) of each prompt of a share; `collect` keeps both lists in order."""
    closed, still_open = list(share.groups), list(share.open)
    parts = []
    for index, prompt in mine:
        is_closed = bool(closed) and closed[0].prompt is prompt
        group = (closed if is_closed else still_open).pop(0)
        parts.append((index, is_closed, group.responses, group.scores))
    return parts
