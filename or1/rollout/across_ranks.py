"""A rollout across ranks: the ranks share the responses to generate, each scores its own, and all get all groups.

A response does not depend on the number of ranks nor on the rank that made it: random numbers depend on the prompt's
index in the step and the sample's index. Engines that take jobs by demand (`TakingEngine`) share one list of them.
Other engines get every size-th prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from or1.core import codec
from or1.core.errors import DistError
from or1.core.types import Group, OpenGroup, Prompt, Response, Score
from or1.dist.board import Board
from or1.dist.world import World
from or1.reward.scorer import Scorer
from or1.rollout.collect import NOT_STARTED, Part, Progress, Rollout, Share, collect, collect_parts, no_progress
from or1.rollout.dealing import Dealt, Hand, ResponseLengths, first_room, fixed_units, longest_first, single_units
from or1.rollout.engine import Engine, Job, Sampling, TakingEngine


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
    lengths: ResponseLengths | None = None,
) -> Rollout:
    """Generate and score this rank's part of the groups and prompts. Not collective, unless the engine is.

    lengths  of earlier responses, equal on all ranks: what is expected to be long starts first
    """
    known = ResponseLengths() if lengths is None else lengths
    whole = [group.prompt for group in carried] + list(prompts)
    if world.size == 1 or world.board is None or not isinstance(engine, TakingEngine):
        mine = world.share(len(whole))
        parts = carried[mine.start :: mine.step]

        def order(jobs: Sequence[Job]) -> list[int]:
            return longest_first(known.expected([whole[i] for i in mine], jobs, parts))

        return collect(
            engine,
            scorer,
            [whole[i] for i in mine if i >= len(carried)],
            replace(sampling, numbers=tuple(mine)),
            progress,
            carried=parts,
            order=order if engine.continuous_batching else None,
        )
    board = world.board

    def deal(jobs: Sequence[Job]) -> Dealt:
        return _dealt(world, board, engine, jobs, known.expected(whole, jobs, carried), sampling)

    done = board.counter(f"done-{sampling.seed}")
    total = sum(score is None for group in carried for score in group.scores) + sampling.samples * len(prompts)
    return collect_parts(
        engine,
        scorer,
        prompts,
        sampling,
        deal,
        carried=carried,
        scores=lambda p: p % world.size == world.rank,
        progress=lambda count: progress(done.add(count), total),
    )


def _dealt(
    world: World, board: Board, engine: TakingEngine, jobs: Sequence[Job], expected: Sequence[float], sampling: Sampling
) -> Dealt:
    """Return the jobs that this rank, or its group of ranks with one model, takes."""
    # By the seed, because rollouts of two threads may ask in different orders on different ranks.
    counter = board.counter(f"deal-{sampling.seed}")
    takers, taker = world.size // engine.ranks_per_model, world.rank // engine.ranks_per_model
    if getattr(engine, "continuous_batching", False):
        units, room = single_units(jobs, expected), first_room(engine.batch_size)
        tokens = {job.slot: value for job, value in zip(jobs, expected, strict=True)}
        return Dealt(units, Hand(len(units), takers, taker, room, counter), tokens)
    units = fixed_units(jobs, expected, engine.batch_size, world.size)
    return Dealt(units, Hand(len(units), takers, taker, 1, counter), batches=True)


def exchange(world: World, share: Rollout, prompts: Sequence[Prompt], carried: Sequence[OpenGroup]) -> Rollout:
    """Return the whole rollout, given every rank's result of `collect_share`. Collective.

    If a rank was stopped and a response is missing, the whole is interrupted: its open groups are all groups.
    Waits for slower ranks as long as they work. Raises RankSilent, DistError if a response is missing without a stop.
    """
    if world.size == 1:
        return share
    all_prompts = [group.prompt for group in carried] + list(prompts)
    # Prompts are not sent: every rank has them, and their data rows may hold objects of any type.
    mine = share.parts if isinstance(share, Share) else _parts(share, world, all_prompts)
    samples = share.samples if isinstance(share, Share) else 0
    sent = codec.dumps(([tuple(part) for part in mine], share.generate_s, share.reward_s, share.interrupted))
    world.meet()
    shares: list[tuple[list[Part], float, float, bool]] = [codec.loads(data) for data in world.gather(sent)]
    made: list[_Made] = [dict(enumerate(zip(group.responses, group.scores, strict=True))) for group in carried]
    made += [{} for _ in prompts]
    for prompt, sample, response, score in (part for parts, *_ in shares for part in parts):
        made[prompt][sample] = response, score
    seconds = [generate_s for _, generate_s, *_ in shares]
    size = max([samples, *map(len, made)])
    interrupted = any(stopped for *_, stopped in shares) and any(_is_missing(each, size) for each in made)
    groups, unfinished = _open_groups(all_prompts, made, size) if interrupted else _groups(all_prompts, made, size)
    return Rollout(
        groups=groups,
        generate_s=max(seconds),
        reward_s=max(reward_s for _, _, reward_s, _ in shares),
        open=unfinished,
        interrupted=interrupted,
        idle_s=max(seconds) - sum(seconds) / len(seconds),
    )


_Made = dict[int, tuple[Response, Score | None]]
"""Responses of a group with their scores, by the index of the sample."""


def _is_missing(samples: _Made, size: int) -> bool:
    """Return True if a response was not made, is unfinished, or has no score yet."""
    return len(samples) < size or any(score is None for _, score in samples.values())


def _open_groups(prompts: Sequence[Prompt], made: Sequence[_Made], size: int) -> tuple[list[Group], list[OpenGroup]]:
    """Return no group, and all of them as open ones, in prompt order."""
    nothing = (NOT_STARTED, None)
    found = []
    for prompt, samples in zip(prompts, made, strict=True):
        pairs = [samples.get(s, nothing) for s in range(size)]
        found.append(OpenGroup(prompt, tuple(r for r, _ in pairs), tuple(score for _, score in pairs)))
    return [], found


def _groups(prompts: Sequence[Prompt], made: Sequence[_Made], size: int) -> tuple[list[Group], list[OpenGroup]]:
    """Return the scored groups and the others, both in prompt order."""
    scored: list[Group] = []
    unfinished: list[OpenGroup] = []
    for prompt, samples in zip(prompts, made, strict=True):
        if sorted(samples) != list(range(size)):
            raise DistError(f"prompt {prompt.id} has responses {sorted(samples)} of {size}; no rank made the others")
        responses = tuple(samples[s][0] for s in range(size))
        scores = [samples[s][1] for s in range(size)]
        known = tuple(score for score in scores if score is not None)
        if len(known) == size:
            scored.append(Group(prompt, responses, known))
        else:
            unfinished.append(OpenGroup(prompt, responses, tuple(scores)))
    return scored, unfinished


def _parts(share: Rollout, world: World, prompts: Sequence[Prompt]) -> list[Part]:
    """Return the responses of a share of whole groups; `collect` keeps both lists of groups in prompt order."""
    scored, unfinished = list(share.groups), list(share.open)
    parts: list[Part] = []
    for index in world.share(len(prompts)):
        is_scored = bool(scored) and scored[0].prompt is prompts[index]
        group = (scored if is_scored else unfinished).pop(0)
        parts += [
            Part(index, s, r, score) for s, (r, score) in enumerate(zip(group.responses, group.scores, strict=True))
        ]
    return parts
