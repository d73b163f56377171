"""Groups -> minibatches: shaped rewards, advantages, rejection, and the responses of each optimizer step."""

# P prompts, K kept groups, M responses each

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from or1.config import LossConfig, RewardConfig, StageConfig
from or1.core.types import Group, TrainSequence
from or1.magic.advantage import has_advantage
from or1.magic.baselines import advantages
from or1.magic.denominator import Normaliser
from or1.magic.overlong import overlong_penalty


@dataclass(frozen=True)
class Selection:
    """The groups of a rollout that are trained.

    kept           groups with an advantage, in rollout order
    advantages_KM  f64[K, M], NaN for a response without a reward
    flags          for every group of the rollout, True if it is kept
    """

    kept: list[Group]
    advantages_KM: np.ndarray
    flags: list[bool]

    def advantages_by_group(self) -> list[np.ndarray | None]:
        """Return the advantages of every group of the rollout, None for a rejected one."""
        rows = iter(self.advantages_KM)
        return [next(rows) if flag else None for flag in self.flags]


def select(groups: Sequence[Group], loss: LossConfig, reward: RewardConfig, stage: StageConfig) -> Selection:
    """Compute advantages (Eq. 2.5) and reject groups: T_k = {i : some A_ij is not 0} (Eq. 3.1).

    Rejection looks at the rewards as they were given: a penalty for length alone is no reason to train on a problem
    that is solved or hopeless (DAPO, section 3.2). "reinforce_pp" compares all responses of the step, so there a group
    of equal rewards has an advantage. A group whose log-probs are all unknown cannot be trained.
    """
    if not groups:
        return Selection([], np.empty((0, 0)), [])
    rewards_PM = np.stack([group.rewards for group in groups])
    if reward.overlong_buffer:
        lengths_PM = np.array([[len(r.token_ids) for r in group.responses] for group in groups])
        penalty_PM = overlong_penalty(lengths_PM, stage.max_response_tokens, reward.overlong_buffer)
        rewards_PM = rewards_PM + reward.overlong_penalty * penalty_PM
    truncated_PM = np.array([[r.truncated for r in group.responses] for group in groups])
    kind, mask = loss.advantage, loss.advantage_mask
    advantages_PM = advantages(rewards_PM, kind, truncated_PM=truncated_PM, mask=mask, scale_std=loss.advantage_std)
    keep_P = np.array([is_known(group) for group in groups])
    if loss.reject_zero_advantage:
        keep_P &= np.array([loss.advantage == "reinforce_pp" or has_advantage(group) for group in groups])
        keep_P &= (np.nan_to_num(advantages_PM) != 0).any(axis=1)
    kept = [group for group, keep in zip(groups, keep_P, strict=True) if keep]
    return Selection(kept, advantages_PM[keep_P], keep_P.tolist())


@dataclass(frozen=True)
class Minibatch:
    """The sequences of one optimizer step, and what the sum of their token losses is divided by."""

    sequences: list[TrainSequence]
    normaliser: Normaliser


def minibatches(chosen: Selection, loss: LossConfig, stage: StageConfig) -> list[Minibatch]:
    """Return minibatches of at most `minibatch_prompts` groups, in rollout order.

    By loss.denominator:
    kept     parts of nearly equal size: a small rest would take a whole optimizer step of its own
    sampled  as in the released code: full parts and a rest. Each part is divided by the tokens of a full part, so the
             step of the rest is as much smaller. Groups that replaced rejected groups do not make a part larger
    """
    nominal = stage.minibatch_prompts or stage.prompts_per_step
    count = len(chosen.kept)
    if loss.denominator == "sampled":
        parts = [np.arange(at, min(at + nominal, count)) for at in range(0, count, nominal)]
    else:
        parts = np.array_split(np.arange(count), max(math.ceil(count / nominal), 1))
    groups_of = _sequences_of(chosen)
    # Partial rollouts may complete fewer groups than a minibatch has.
    full = min(nominal, len(chosen.flags))
    made = []
    for part in parts:
        scale = full / len(part) if loss.denominator == "sampled" else 1.0
        normaliser = Normaliser(loss.normaliser, stage.max_response_tokens, scale)
        made.append(Minibatch([s for i in part for s in groups_of[i]], normaliser))
    # A batch whose responses have no reward or no known log-prob has nothing to train.
    return [batch for batch in made if any(s.known_tokens for s in batch.sequences)]


def _sequences_of(chosen: Selection) -> list[list[TrainSequence]]:
    """Return the responses of every kept group that can be trained."""
    return [
        [
            TrainSequence(group.prompt.token_ids, response.token_ids, response.logp, float(advantage))
            for response, advantage in zip(group.responses, advantages_M, strict=True)
            # Left out: a response without a reward, and one that was aborted before its first token.
            if not math.isnan(advantage) and len(response.token_ids)
        ]
        for group, advantages_M in zip(chosen.kept, chosen.advantages_KM, strict=True)
    ]


def is_known(group: Group) -> bool:
    """Return True if a group has a token with a known log-probability."""
    return any(np.isfinite(r.logp).any() for r in group.responses)
