"""A rollout across ranks: each rank samples and scores a part of the prompts, and all ranks get all groups.

The responses to a prompt do not depend on the number of ranks: random numbers depend on the prompt's index in the step
and the sample's index. Prompts are dealt out one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from or1.core import codec
from or1.core.types import Group, OpenGroup, Prompt, Response
from or1.dist.world import World
from or1.reward.scorer import Scorer
from or1.rollout.collect import Progress, Rollout, collect, no_progress
from or1.rollout.engine import Engine, Sampling

_Part = tuple[int, bool, tuple[Response, ...], tuple[Any, ...]]
"""Index of a prompt, True if its group is scored, responses, and scores (None for an unfinished response)."""


def collect_spread(
    world: World,
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    progress: Progress = no_progress,
) -> Rollout:
    """Run `collect` across all ranks. Collective.

    Returns groups in prompt order, equal on every rank, and the seconds of the slowest rank.
    """
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
    """Run `collect` for the groups and prompts of this rank. Not collective, unless the engine is."""
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
    """Return the whole rollout, given every rank's result of `collect_share`. Collective.

    If a rank's part was interrupted, so is the whole, and its open groups are those of all ranks.
    """
    if world.size == 1:
        return share
    all_prompts = [group.prompt for group in carried] + list(prompts)
    # Prompts are not sent: every rank has them, and their data rows may hold objects of any type.
    parts = _parts(share, [(i, all_prompts[i]) for i in world.share(len(all_prompts))])
    mine = codec.dumps((parts, share.generate_s, share.reward_s, share.interrupted))
    shares: list[tuple[list[_Part], float, float, bool]] = [codec.loads(data) for data in world.gather(mine)]
    interrupted = any(share[3] for share in shares)
    scored: dict[int, Group] = {}
    unfinished: dict[int, OpenGroup] = {}
    for index, is_scored, responses, scores in (part for parts, *_ in shares for part in parts):
        if is_scored and not interrupted:
            scored[index] = Group(all_prompts[index], responses, scores)
        else:
            unfinished[index] = OpenGroup(all_prompts[index], responses, scores)
    return Rollout(
        groups=[scored[i] for i in sorted(scored)],
        generate_s=max(generate_s for _, generate_s, *_ in shares),
        reward_s=max(reward_s for _, _, reward_s, _ in shares),
        open=[unfinished[i] for i in sorted(unfinished)],
        interrupted=interrupted,
    )


def _parts(share: Rollout, mine: Sequence[tuple[int, Prompt]]) -> list[_Part]:
    """Return the part of each prompt of a share; `collect` keeps both lists of groups in prompt order."""
    scored, unfinished = list(share.groups), list(share.open)
    parts: list[_Part] = []
    for index, prompt in mine:
        is_scored = bool(scored) and scored[0].prompt is prompt
        group = (scored if is_scored else unfinished).pop(0)
        parts.append((index, is_scored, group.responses, group.scores))
    return parts
