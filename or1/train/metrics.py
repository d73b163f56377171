"""The metrics of a step: of its rollout, of its updates, and its times."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from or1.core.types import Group, Score, Status
from or1.dist.oom_retry import RowBudget
from or1.dist.world import World
from or1.magic.advantage import has_advantage
from or1.magic.entropy import rollout_entropy
from or1.model.rows import Microbatch
from or1.reward.terms import RIGHT, is_graded, is_unclosed, unverifiable_groups
from or1.rollout.collect import Rollout
from or1.run.state import TrainState, unknown_tokens
from or1.train.optim import UpdateResult
from or1.train.source_metrics import Sources, complete_reward
from or1_kernels.head import PolicyStats
from or1_kernels.objective import PolicyObjective, engine_weight


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return rewards, statuses and lengths over all groups of a step, before rejection; empty without a complete group.

    reward/graded              share of rewards that are neither 0 nor 1; see `or1.reward.terms`
    reward/unverifiable        groups whose gold answer cannot be verified; absent if there is none
    completion/truncated       share of responses that were cut
    completion/no_think_close  share of responses that ended without `</think>` and were scored 0 for that
    reward/status/truncated    share of responses scored 0 for either
    group/solved, failed       share of groups whose rewards are all equal, and at least 1, or at most 0
    """
    if not groups:
        return {}
    rewards = np.stack([group.rewards for group in groups])
    lengths = np.array([response.sampled_tokens for group in groups for response in group.responses])
    statuses = Counter(score.status for group in groups for score in group.scores)
    constant = np.array([not has_advantage(group) for group in groups])
    # A response may have no reward (NaN), and so may all of a group; such a group is neither solved nor failed.
    scored = ~np.isnan(rewards)
    mean = np.divide(
        rewards.sum(axis=1, where=scored),
        scored.sum(axis=1),
        out=np.full(len(groups), np.nan),
        where=scored.any(axis=1),
    )
    given = rewards[scored] if scored.any() else np.array([np.nan])
    pairs = [pair for group in groups for pair in zip(group.responses, group.scores, strict=True)]
    unverifiable = unverifiable_groups(groups)
    return {
        "reward/mean": float(given.mean()),
        **{f"reward/p{q}": float(np.percentile(given, q)) for q in (10, 50, 90)},
        "reward/graded": float(np.mean([is_graded(reward) for reward in rewards.flat])),
        "group/frac_zero_std": float(constant.mean()),
        "group/solved": float((constant & (mean >= RIGHT)).mean()),
        "group/failed": float((constant & (mean <= 0)).mean()),
        "completion/len_mean": float(lengths.mean()),
        "completion/len_max": float(lengths.max()),
        "completion/count": float(rewards.size),
        "completion/truncated": float(np.mean([response.truncated for response, _ in pairs])),
        "completion/no_think_close": float(np.mean([is_unclosed(*pair) for pair in pairs])),
        **{f"reward/status/{status.value}": statuses[status] / rewards.size for status in Status},
        **({"reward/unverifiable": float(len(unverifiable))} if unverifiable else {}),
        **_part_means([score for _, score in pairs]),
    }


def _part_means(scores: Sequence[Score]) -> dict[str, float]:
    """Return the mean of each of `[[reward.parts]]` over the responses that have it."""
    rewards: dict[str, list[float]] = {}
    for name, reward in (part for score in scores for part in score.parts):
        if not math.isnan(reward):
            rewards.setdefault(name, []).append(reward)
    return {f"reward/part/{name}": float(np.mean(values)) for name, values in rewards.items()}


def engine_metrics(rollout: Rollout, version: int) -> dict[str, float]:
    """Return what the engine did with a rollout. version: of the policy that is about to be updated.

    completion/deadline   share of responses that the deadline aborted
    group/open            groups that continue under the next policy
    policy/staleness      mean number of policies between the one that sampled a token and the one that trains on it
    policy/staleness_max  its largest value
    """
    responses = [response for group in rollout.groups for response in group.responses]
    behind = sum(float((version - r.token_versions).sum()) for r in responses)
    oldest = min((int(r.token_versions.min()) for r in responses if len(r.token_ids)), default=version)
    return {
        "completion/deadline": sum(r.finish == "deadline" for r in responses) / max(len(responses), 1),
        "group/open": float(len(rollout.open)),
        "policy/staleness": behind / max(sum(len(r.token_ids) for r in responses), 1),
        "policy/staleness_max": float(version - oldest),
    }


@dataclass
class UpdateStats:
    """Sums over the tokens of a step's updates. They stay on the device until `metrics`, so that no update waits."""

    tokens: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    ratio_max: torch.Tensor | None = None
    results: list[UpdateResult] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    routing: list[dict[str, float]] = field(default_factory=list)

    def add_row(
        self,
        batch: Microbatch,
        stats: PolicyStats,
        objective: PolicyObjective | None = None,
        old_is_engine: bool = False,
    ) -> None:
        """Add one packed row.

        objective      of the update, whose masked tokens are counted
        old_is_engine  True if old log-probs came from the engine and not from the trainer
        """
        # After the first update of a rollout, the current log-probs include the movement of the policy.
        own = stats.logp if batch.old_logp_N is None or old_is_engine else batch.old_logp_N
        drift = own.double() - batch.rollout_logp_N.double()
        values = {
            "policy/entropy_exact": stats.entropy,
            "policy/clip_frac": stats.clipped,
            "policy/ratio_mean": stats.ratio,
            # k3 estimator of KL(engine || trainer), non-negative for every token.
            "mismatch/kl": drift.exp() - 1 - drift,
        }
        if objective is not None and objective.is_mask:
            values["mismatch/masked_tokens"] = engine_weight(objective, own, batch.rollout_logp_N) == 0
        if len(drift):  # a rank's anchor row has none
            self._note_ratio(drift.max().exp())
        self.tokens += len(stats.logp)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.sum(dtype=torch.float64)

    def add_rows(self, rows: UpdateStats) -> None:
        """Add the rows of another UpdateStats."""
        self.tokens += rows.tokens
        for name, total in rows.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        if rows.ratio_max is not None:
            self._note_ratio(rows.ratio_max)

    def _note_ratio(self, largest: torch.Tensor) -> None:
        self.ratio_max = largest if self.ratio_max is None else torch.maximum(self.ratio_max, largest)

    def add_update(self, loss: float, result: UpdateResult) -> None:
        """Add one optimizer step."""
        self.losses.append(loss)
        self.results.append(result)

    def reduce(self, world: World) -> None:
        """Sum over ranks. Call once, before `metrics`. Collective."""
        if world.size == 1 or not self.results:
            return
        # Every rank trained a row in every update, an anchor at least, so all ranks have the same names.
        names = sorted(self.sums)
        values = world.sum(
            torch.stack([torch.as_tensor(self.tokens, dtype=torch.float64), *(self.sums[name].cpu() for name in names)])
        )
        self.tokens, self.sums = int(values[0]), dict(zip(names, values[1:], strict=True))
        # Below every ratio, for a rank that trained anchors only.
        mine = torch.zeros((), dtype=torch.float64) if self.ratio_max is None else self.ratio_max.double()
        self.ratio_max = world.max(mine)

    def metrics(self) -> dict[str, float]:
        """Return means over tokens, and means over optimizer steps."""
        if not self.results or self.ratio_max is None:
            return {"optim/updates": 0.0, "optim/skipped": 0.0}
        return {name: float(total) / self.tokens for name, total in self.sums.items()} | {
            # Largest weight that a token would have without loss.is_cap.
            "mismatch/ratio_max": float(self.ratio_max),
            **{name: float(np.mean([each[name] for each in self.routing])) for name in (self.routing or [{}])[0]},
            "optim/loss": float(np.mean(self.losses)),
            "optim/grad_norm": float(np.mean([r.grad_norm for r in self.results])),
            "optim/lr": self.results[-1].lr,
            "optim/updates": float(sum(r.took for r in self.results)),
            "optim/skipped": float(sum(not r.took for r in self.results)),
        }


class StepMeter:
    """The metrics of one step while it runs.

    rollout  of the step
    version  of the policy that is about to be updated
    sources  of the run's prompts, for metrics by source
    """

    def __init__(self, rollout: Rollout, version: int, sources: Sources | None = None):
        self._rollout, self._seconds = rollout, dict.fromkeys(("train", "wait", "sync"), 0.0)
        self._metrics = rollout_metrics(rollout.groups) | engine_metrics(rollout, version)
        self._metrics |= complete_reward(rollout.groups) | (sources.metrics(rollout.groups) if sources else {})
        entropy = rollout_entropy(rollout.groups)
        if math.isfinite(entropy):
            self._metrics["policy/entropy_all"] = entropy

    @property
    def staleness(self) -> float:
        """Mean number of policies between the one that sampled a token and the one that is updated."""
        return self._metrics["policy/staleness"]

    @contextmanager
    def timed(self, part: Literal["train", "wait", "sync"]) -> Iterator[None]:
        """Measure the wall time of a part of the step: training, waiting for the next rollout, pushing weights."""
        began = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - began

    def add(self, metrics: dict[str, float]) -> None:
        """Add metrics by name."""
        self._metrics |= metrics

    def finish(self, stats: UpdateStats, kept: int, state: TrainState, budget: RowBudget) -> dict[str, float]:
        """Return all metrics of the step. stats: of its updates, summed over ranks. kept: number of trained groups."""
        rollout, seconds = self._rollout, self._seconds
        tokens = sum(r.sampled_tokens for g in rollout.groups for r in g.responses)
        return (
            self._metrics
            | stats.metrics()
            | {
                "group/kept": float(kept),
                "rollout/nonfinite_logp": float(unknown_tokens(rollout.groups)),
                "policy/entropy_controller": state.entropy.coef,
                "optim/out_of_memory": float(budget.out_of_memory),
                "optim/row_tokens": float(budget.max_tokens),
                "data/epoch": float(state.sampler.epoch),
                "data/dropped_solved": float(len(state.solved.dropped)),
                "perf/rollout_idle": rollout.idle_s / rollout.generate_s if rollout.generate_s else 0.0,
                "perf/tokens_per_s": tokens
                / (rollout.generate_s + rollout.reward_s + seconds["train"] + seconds["wait"]),
                # A rollout that is made during training costs the step only what it waits for it after training.
                "time/rollout": rollout.generate_s + seconds["wait"],
                "time/reward": rollout.reward_s,
                "time/reward_exposed": rollout.reward_s,
                "time/train": seconds["train"],
                "time/sync": seconds["sync"],
            }
        )
