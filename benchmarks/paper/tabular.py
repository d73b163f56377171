"""Tier A: the ladder with a table instead of a model, many seeds at once, exact accuracy and entropy.

A policy has logits of the rungs and of every content digit: shared ones, and ones of each class. Rollouts are sampled.
Advantages, rejection, token loss, denominator and entropy controller are or1's. The random numbers of a seed do not
depend on the other seeds of the batch. Runs of a batch do not touch one another.

Legend: R runs (seeds), P prompts, M responses each, B = P M; C classes, S rungs, K content places, V digits, L places
of a response, N tokens of all runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.arms import Arm
from benchmarks.paper.ladder import CLASSES, DIGITS, LENGTHS, RUNGS, level
from or1.magic.advantage import group_advantages, have_advantages
from or1.magic.denominator import TOKEN_MEAN
from or1.magic.entropy import EntropyController
from or1_kernels.objective import PolicyObjective, token_loss

PRIOR = (0.55, 0.28, 0.11, 0.04, 0.015, 0.005)  # base probability of each rung
SKILL = (0.85, 0.8, 0.8, 0.8, 0.8, 0.8)  # base probability of the right digit
_RUNG_NOISE, _DIGIT_NOISE = 0.3, 0.2  # standard deviation of a class's own logits at the start
_FLOAT = torch.float32
_PLACES = sum(LENGTHS)
_LONGEST = max(LENGTHS)
_LENGTHS_S = torch.tensor(LENGTHS)
_FIRST_S = _LENGTHS_S.cumsum(0) - _LENGTHS_S  # the number of a rung's first content place
_SOLVES_CS = torch.tensor([[float(s >= level(c)) for s in range(RUNGS)] for c in range(CLASSES)], dtype=_FLOAT)


class Policies:
    """The tables of R runs. Digit 0 is the right one."""

    def __init__(self, seeds: Sequence[int], prior: Sequence[float] = PRIOR):
        draws = [np.random.default_rng([seed, 0]) for seed in seeds]
        rungs = [rng.standard_normal((CLASSES, RUNGS)) for rng in draws]
        digits = [rng.standard_normal((_PLACES, DIGITS, CLASSES)) for rng in draws]
        rung_S = torch.tensor(prior, dtype=_FLOAT).log()
        skill_K = torch.tensor(SKILL, dtype=_FLOAT).repeat_interleave(_LENGTHS_S)
        digit_KV = torch.zeros(_PLACES, DIGITS, dtype=_FLOAT)
        digit_KV[:, 0] = (skill_K / (1 - skill_K) * (DIGITS - 1)).log()
        runs = len(seeds)
        self.tables = [
            rung_S.repeat(runs, 1, 1),
            _RUNG_NOISE * torch.from_numpy(np.stack(rungs)).to(_FLOAT),
            digit_KV[None, :, :, None].repeat(runs, 1, 1, 1),
            _DIGIT_NOISE * torch.from_numpy(np.stack(digits)).to(_FLOAT),
        ]
        for table in self.tables:
            table.requires_grad_()

    def logp(self) -> tuple[Tensor, Tensor]:
        """Return log-probs of rungs, f32[R, C, S], and of content digits, f32[R, K, V, C]."""
        rung, own_rung, digit, own_digit = self.tables
        return (rung + own_rung).log_softmax(-1), (digit + own_digit).log_softmax(2)

    @torch.no_grad()
    def exact(self) -> dict[str, Tensor]:
        """Return accuracy, entropy in nats a token, and mean probability of the top rung of each run; f32[R]."""
        rung_RCS, digit_RKVC = self.logp()
        p_RCS = rung_RCS.exp()
        right_RCS = _by_rung(digit_RKVC[:, :, 0]).exp()
        accuracy_R = (p_RCS * right_RCS * _SOLVES_CS).sum(-1).mean(-1)
        entropy_RC = -(p_RCS * rung_RCS).sum(-1)
        entropy_RC = entropy_RC + (p_RCS * _by_rung(_entropy(digit_RKVC, 2))).sum(-1)
        tokens_RC = 1 + (p_RCS * _LENGTHS_S).sum(-1)
        entropy_R = entropy_RC.sum(-1) / tokens_RC.sum(-1)
        return {"accuracy": accuracy_R, "entropy": entropy_R, "top": p_RCS[..., -1].mean(-1)}


def _by_rung(values_RKC: Tensor) -> Tensor:
    """Return the sum over the content places of each rung; f32[R, C, S]."""
    return torch.stack([part.sum(1) for part in values_RKC.split(list(LENGTHS), dim=1)], -1)


def _entropy(logp: Tensor, dim: int = -1) -> Tensor:
    return -(logp.exp() * logp).sum(dim)


class Adam:
    """torch.optim.AdamW without decay after clip_grad_norm_(1.0), for R runs with step counts of their own."""

    def __init__(self, tables: Sequence[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.999)):
        self.tables, self.lr, self.betas = tables, lr, betas
        self.means = [torch.zeros_like(t) for t in tables]
        self.squares = [torch.zeros_like(t) for t in tables]
        self.steps_R = torch.zeros(len(tables[0]), dtype=torch.float64)

    @torch.no_grad()
    def step(self, active_R: Tensor) -> None:
        """Take a step of the active runs with the gradients of the tables; leave the other runs as they are."""
        active_R = active_R.double()
        self.steps_R += active_R
        grads = [t.grad for t in self.tables if t.grad is not None]
        dtype = self.tables[0].dtype
        norm_R = torch.stack([g.square().flatten(1).sum(1) for g in grads]).sum(0).sqrt()
        clip_R = (1 / (norm_R + 1e-6)).clamp(max=1)
        steps_R = self.steps_R.clamp(min=1)
        rate_R = (self.lr * active_R / (1 - self.betas[0] ** steps_R)).to(dtype)
        bias_R = (1 - self.betas[1] ** steps_R).sqrt().to(dtype)
        active_R = active_R.to(dtype)
        for table, grad, mean, square in zip(self.tables, grads, self.means, self.squares, strict=True):
            shape = (-1,) + (1,) * (table.dim() - 1)
            grad *= clip_R.view(shape)
            mean.lerp_(grad, ((1 - self.betas[0]) * active_R).view(shape))
            square.lerp_(grad.square_(), ((1 - self.betas[1]) * active_R).view(shape))
            scale = square.sqrt().div_(bias_R.view(shape)).add_(1e-8)
            table -= (rate_R.view(shape) * mean).div_(scale)
            table.grad = None


@dataclass
class Rollouts:
    """The sampled tokens of all runs: R B rung tokens, then the content tokens.

    rung_N, digit_N  index into the flat log-prob tables, of the rung tokens and of the content tokens
    state_N          index of the content tokens' distributions, run, place and class
    response_N       response of every token, (run * P + prompt) * M + number
    logp_N           log-prob of every token when sampled
    rewards_GM       rewards of every group, f64[R P, M]
    """

    rung_N: Tensor
    digit_N: Tensor
    state_N: Tensor
    response_N: Tensor
    logp_N: Tensor
    rewards_GM: np.ndarray


@torch.no_grad()
def sample(policies: Policies, draws: Sequence[np.random.Generator], prompts: int, group: int) -> Rollouts:
    """Sample `group` responses to each of `prompts` prompts of every run."""
    runs, size = len(draws), prompts * group
    class_RP = torch.from_numpy(np.stack([rng.integers(0, CLASSES, prompts) for rng in draws]))
    uniform_RBL = torch.from_numpy(np.stack([rng.random((size, 1 + _LONGEST), np.float32) for rng in draws]))
    rung_RCS, digit_RKVC = policies.logp()
    class_RB = class_RP.repeat_interleave(group, 1)
    row_RB = torch.arange(runs)[:, None] * CLASSES + class_RB
    rung_RB = _draw(rung_RCS.view(-1, RUNGS), row_RB, uniform_RBL[..., 0])
    place_L = torch.arange(_LONGEST)
    used_RBL = place_L < _LENGTHS_S[rung_RB][..., None]
    place_RBL = torch.arange(runs)[:, None, None] * _PLACES + _FIRST_S[rung_RB][..., None] + place_L
    row_N = (place_RBL * CLASSES + class_RB[..., None])[used_RBL]
    # Not a view: over the last, short dimension a softmax takes several times as long, so digits are not last.
    digit_XV = digit_RKVC.transpose(2, 3).reshape(-1, DIGITS)
    choice_N = _draw(digit_XV, row_N, uniform_RBL[..., 1:][used_RBL])
    right_RBL = torch.ones(used_RBL.shape, dtype=torch.bool)
    right_RBL[used_RBL] = choice_N == 0
    solved_RB = right_RBL.all(-1) & _SOLVES_CS[class_RB, rung_RB].bool()
    response_RB = torch.arange(runs * size).view(runs, size)
    rung_N = (row_RB * RUNGS + rung_RB).flatten()
    digit_N = (row_N // CLASSES * DIGITS + choice_N) * CLASSES + row_N % CLASSES
    return Rollouts(
        rung_N,
        digit_N,
        row_N,
        torch.cat([response_RB.flatten(), response_RB[..., None].expand_as(used_RBL)[used_RBL]]),
        torch.cat([rung_RCS.flatten()[rung_N], digit_RKVC.flatten()[digit_N]]),
        solved_RB.view(-1, group).double().numpy(),
    )


def _draw(logp_XV: Tensor, row: Tensor, uniform: Tensor) -> Tensor:
    """Return a choice from the distribution logp_XV[row] by inversion."""
    last = logp_XV.shape[-1] - 1
    return (uniform[..., None] > logp_XV.exp().cumsum(-1)[row]).sum(-1).clamp(max=last)


def parts(keep_RP: np.ndarray, number_R: np.ndarray) -> np.ndarray:
    """Return the minibatch of every group, i64[R, P]; -1 for a group that is not kept.

    number_R  minibatches of every run. Their sizes are nearly equal, the larger ones first, as in
              or1.magic.selection.minibatches with denominator "kept"
    """
    count_R, number_R = keep_RP.sum(1), np.maximum(number_R, 1)
    small_R, rest_R = count_R // number_R, count_R % number_R
    rank_RP = keep_RP.cumsum(1) - 1
    large_R = rest_R * (small_R + 1)  # groups in the minibatches that have one more
    in_large_RP = rank_RP // (small_R + 1)[:, None]
    in_small_RP = rest_R[:, None] + (rank_RP - large_R[:, None]) // np.maximum(small_R, 1)[:, None]
    part_RP = np.where(rank_RP < large_R[:, None], in_large_RP, in_small_RP)
    return np.where(keep_RP, part_RP, -1)


def numbers(keep_RP: np.ndarray, arm: Arm) -> np.ndarray:
    """Return the number of minibatches of every run.

    By default as many as the arm's name says. or1 and the released code take no more than the kept groups fill, which
    is arm.filled here: with half of the groups rejected, (4,64,16,1) then takes two steps instead of four.
    """
    count_R = keep_RP.sum(1)
    if arm.filled:
        return -(-count_R // arm.minibatch)
    return np.minimum(arm.prompts // arm.minibatch, count_R)


class Batch:
    """Training of one arm on R seeds at once."""

    def __init__(self, arm: Arm, seeds: Sequence[int], lr: float, prior: Sequence[float] = PRIOR):
        self.arm, self.runs = arm, len(seeds)
        self.policies = Policies(seeds, prior)
        self.optimizer = Adam(self.policies.tables, lr * arm.lr_scale)
        self.objective = PolicyObjective(clip_high=arm.clip_high)
        self.controllers = [EntropyController(**dict(arm.entropy or {"control": "none"})) for _ in seeds]
        self.draws = [np.random.default_rng([seed, 1]) for seed in seeds]

    def step(self) -> dict[str, np.ndarray]:
        """Take one rollout and its updates in every run. Return numbers of each run; f32[R]."""
        arm, runs = self.arm, self.runs
        batch = sample(self.policies, self.draws, arm.prompts, arm.group)
        advantages_GM = group_advantages(batch.rewards_GM)
        keep_RP = have_advantages(batch.rewards_GM).reshape(runs, arm.prompts)
        number_R = numbers(keep_RP, arm)
        part_RP = parts(keep_RP, number_R)
        part_N = torch.from_numpy(part_RP.reshape(-1))[batch.response_N // arm.group]
        run_N = batch.response_N // (arm.prompts * arm.group)
        everything_R = _mean(-batch.logp_N, run_N, runs)
        kept_N = part_N >= 0
        kept_R = _mean(-batch.logp_N[kept_N], run_N[kept_N], runs)
        measured_R = (everything_R if arm.measure == "all" else kept_R).tolist()
        trained_R = number_R > 0
        alpha_R = torch.tensor(
            [c.alpha(e) if on else 0.0 for c, e, on in zip(self.controllers, measured_R, trained_R, strict=True)],
            dtype=_FLOAT,
        )
        clipped_R = np.zeros(runs)
        advantage_N = torch.from_numpy(advantages_GM.reshape(-1)).to(_FLOAT)[batch.response_N]
        for _ in range(arm.reuse):
            for i in range(number_R.max(initial=0)):
                clipped_R += self._update(batch, torch.nonzero(part_N == i)[:, 0], run_N, advantage_N, alpha_R)
        for controller, entropy, on in zip(self.controllers, measured_R, trained_R, strict=True):
            if on:
                controller.update(entropy)
        updates_R = number_R * arm.reuse
        return {
            "updates": updates_R,
            "clipped": clipped_R / np.maximum(updates_R, 1),
            "alpha": alpha_R.numpy(),
            "kept_entropy": kept_R.numpy(),
        }

    def _update(
        self, batch: Rollouts, chosen_N: Tensor, run_N: Tensor, advantage_N: Tensor, alpha_R: Tensor
    ) -> np.ndarray:
        """Take one optimizer step on the chosen tokens. Return the share of clipped tokens in each run."""
        rung_RCS, digit_RKVC = self.policies.logp()
        run_N, rungs = run_N[chosen_N], len(batch.rung_N)
        tokens_R = run_N.bincount(minlength=self.runs)
        weight_N = (1 / torch.as_tensor(TOKEN_MEAN.units(tokens_R.clamp(min=1)), dtype=_FLOAT))[run_N]
        first, second = chosen_N[chosen_N < rungs], chosen_N[chosen_N >= rungs] - rungs
        logp_N = torch.cat([rung_RCS.flatten()[batch.rung_N[first]], digit_RKVC.flatten()[batch.digit_N[second]]])
        # Sampled and trained log-probs are the same function of the tables: on-policy the ratio is exactly 1.
        out = token_loss(self.objective, logp_N, advantage_N[chosen_N], old_logp_N=batch.logp_N[chosen_N])
        loss = (weight_N * out.loss_N).sum()
        if alpha_R.any():
            rung_NH = _entropy(rung_RCS).flatten()[batch.rung_N[first] // RUNGS]
            digit_NH = _entropy(digit_RKVC, 2).flatten()[batch.state_N[second]]
            loss = loss - (weight_N * alpha_R[run_N] * torch.cat([rung_NH, digit_NH])).sum()
        loss.backward()
        self.optimizer.step(tokens_R > 0)
        return _mean(out.clipped_N.double(), run_N, self.runs).nan_to_num().numpy()


def _mean(value_N: Tensor, run_N: Tensor, runs: int) -> Tensor:
    """Return the mean of each run's values; NaN for a run without one."""
    return run_N.bincount(value_N, minlength=runs) / run_N.bincount(minlength=runs)


def train(
    arm: Arm, seeds: Sequence[int], lr: float, points: int = 40, prior: Sequence[float] = PRIOR
) -> list[dict[str, Any]]:
    """Train an arm on the seeds. Return the series of each run, a value at the start and at `points` further times.

    accuracy, entropy and top are exact, at that time. The others are means over the rollouts since the time before:
    updates, clipped (share of tokens), bonus (share of rollouts with an entropy bonus) and alpha (its coefficient).
    """
    batch = Batch(arm, seeds, lr, prior)
    series: list[dict[str, list[float]]] = [{} for _ in seeds]
    stride = math.ceil(arm.rollouts / points)
    _note(series, batch.policies.exact())
    logs: list[dict[str, np.ndarray]] = []
    for k in range(1, arm.rollouts + 1):
        log = batch.step()
        logs.append(log | {"bonus": (log["alpha"] > 0).astype(float)})
        if k % stride == 0 or k == arm.rollouts:
            _note(series, batch.policies.exact())
            _note(series, {name: np.mean([x[name] for x in logs], axis=0) for name in logs[0]})
            logs = []
    return [{"arm": arm.name, "seed": seed, "series": s} for seed, s in zip(seeds, series, strict=True)]


def _note(series: Sequence[dict[str, list[float]]], values: dict[str, Any]) -> None:
    for name, value_R in values.items():
        for run, value in zip(series, value_R.tolist(), strict=True):
            run.setdefault(name, []).append(round(value, 6))
