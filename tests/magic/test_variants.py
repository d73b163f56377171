"""Variants the report ablates or the released code chose otherwise, each against hand-computed numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from or1.config import Config, LossConfig, RewardConfig, StageConfig
from or1.magic import group_advantages as torch_advantages
from or1.magic.advantage import group_advantages
from or1.magic.alarms import BASELINE_STEPS, PATIENCE, REPEAT, EntropyWatch
from or1.magic.denominator import Normaliser
from or1.magic.overlong import overlong_penalty
from or1.magic.plateau import has_plateaued
from or1.magic.selection import minibatches, select
from or1.magic.stages import Stages
from tests.helpers.hand_run import ZERO, group, response

STAGE = {"steps": 100, "max_response_tokens": 8, "prompts_per_step": 4, "group_size": 2}


def config_of(stage: dict | None = None, **sections: dict) -> Config:
    stages = [STAGE | (stage or {})]
    return Config.model_validate(
        {"run_dir": "r", "model": {"path": "m"}, "data": {"train": ["t"]}, "stage": stages} | sections
    )


# Rewards 1, 0, 0, 0 with the last response cut. none: mean 1/4, std 1/2. before: of 1, 0, 0 mean 1/3, std 1/sqrt(3).
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("none", [1.5, -0.5, -0.5, -0.5]),
        ("before", [2 / 3 * math.sqrt(3), -math.sqrt(3) / 3, -math.sqrt(3) / 3, 0.0]),
        ("after", [1.5, -0.5, -0.5, 0.0]),
    ],
)
def test_truncation_masks(mask: str, expected: list[float]) -> None:
    cut = np.array([[False, False, False, True]])
    found = group_advantages(np.array([[1.0, 0, 0, 0]]), eps=0.0, truncated_PM=cut, mask=mask)
    assert found[0] == pytest.approx(expected, rel=1e-12)


def test_mask_before_leaves_no_contrast_when_only_truncated_answers_fail() -> None:
    rewards, cut = np.array([[1.0, 1, 0]]), np.array([[False, False, True]])
    assert (group_advantages(rewards, truncated_PM=cut, mask="before") == 0).all()
    assert (group_advantages(rewards, truncated_PM=cut, mask="after")[0, :2] > 0).all()
    alone = np.array([[False, True, True]])
    assert (group_advantages(rewards, truncated_PM=alone, mask="before") == 0).all()
    with pytest.raises(ValueError, match="needs truncated_PM"):
        group_advantages(rewards, mask="after")


@pytest.mark.parametrize("mask", ["before", "after"])
def test_a_truncated_response_without_a_reward_stays_without_one(mask: str) -> None:
    """Of 1, 0 and two cut ones, of which one has reward 0 and one none."""
    rewards, cut = np.array([[1.0, 0, 0, math.nan]]), np.array([[False, False, True, True]])
    found = group_advantages(rewards, truncated_PM=cut, mask=mask)[0]
    assert found[2] == 0 and math.isnan(found[3]) and np.isfinite(found[:3]).all()
    responses = [response(ZERO), response(ZERO), response(ZERO, finish="length"), response(ZERO, finish="length")]
    loss, stage = LossConfig(advantage_mask=mask), StageConfig(**STAGE | {"group_size": 4})
    chosen = select([group([1, 0, 0, math.nan], responses)], loss, RewardConfig(), stage)
    (batch,) = minibatches(chosen, loss, stage)
    assert len(batch.sequences) == 3, "a response without a reward is not trained"


def test_advantages_are_finite_for_the_largest_rewards_that_are_taken() -> None:
    """1e30, 0, 0, 0: the advantages of 1, 0, 0, 0, whose variance is 1/4."""
    rewards = np.array([[1e30, 0, 0, 0], [1e30, -1e30, 1e30, -1e30]])
    assert group_advantages(rewards)[0] == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert np.isfinite(group_advantages(rewards)).all()
    assert torch_advantages(torch.tensor(rewards, dtype=torch.float32))[0].tolist() == pytest.approx([1.5] + [-0.5] * 3)


def test_equal_rewards_that_round_have_advantage_exactly_zero() -> None:
    assert (group_advantages(np.full((1, 3), 0.1)) == 0).all()


def test_dr_grpo_advantages_are_centred_only() -> None:
    assert group_advantages(np.array([[1.0, 0, 0, 0]]), scale_std=False)[0].tolist() == [0.75, -0.25, -0.25, -0.25]


# Two responses of 2 and 6 tokens whose token losses are 1 and 5: sums 2 and 30.
@pytest.mark.parametrize(
    ("normaliser", "loss"),
    [
        (Normaliser("token"), 32 / 8),
        (Normaliser("sequence"), (1 + 5) / 2),
        (Normaliser("dr_grpo", max_tokens=10), 32 / 20),
        (Normaliser("token", scale=4.0), 32 / 8 / 4),
    ],
)
def test_normalisers(normaliser: Normaliser, loss: float) -> None:
    lengths_N, losses_N = np.repeat([2.0, 6.0], [2, 6]), np.repeat([1.0, 5.0], [2, 6])
    total = (normaliser.weights(lengths_N) * losses_N).sum()
    assert total / sum(map(normaliser.units, (2, 6))) == pytest.approx(loss)


def parts_of(kept: int, sampled: int, d_r: int, d_t: int | None, denominator: str) -> list[tuple[int, float]]:
    """Return the groups of each minibatch and its step's factor where `kept` of `sampled` groups are kept."""
    loss = LossConfig(denominator=denominator)
    stage = StageConfig(**STAGE | {"prompts_per_step": d_r, "minibatch_prompts": d_t})
    groups = [group([1, 0], [response(ZERO)] * 2) for _ in range(kept)]
    groups += [group([0, 0], [response(ZERO)] * 2)] * (sampled - kept)
    batches = minibatches(select(groups, loss, RewardConfig(), stage), loss, stage)
    return [(len(batch.sequences) // 2, batch.normaliser.scale) for batch in batches]


@pytest.mark.parametrize(
    ("kept", "sampled", "d_r", "d_t", "parts"),
    [
        (6, 8, 8, None, [(6, 8 / 6)]),  # on-policy: by the batch before rejection
        (7, 8, 8, 4, [(4, 1.0), (3, 4 / 3)]),  # full minibatches have weight 1, the rest its share
        (5, 8, 8, 2, [(2, 1.0), (2, 1.0), (1, 2.0)]),
        (8, 12, 8, None, [(8, 1.0)]),  # four groups were sampled in place of rejected ones
        (6, 12, 8, None, [(6, 8 / 6)]),
        (2, 3, 8, None, [(2, 3 / 2)]),  # partial rollouts have completed three groups
    ],
)
def test_the_released_denominator_is_that_of_a_full_minibatch(
    kept: int, sampled: int, d_r: int, d_t: int | None, parts: list[tuple[int, float]]
) -> None:
    """The released code divides every part by its nominal size, so that the rest of a batch takes a smaller step."""
    assert parts_of(kept, sampled, d_r, d_t, "sampled") == parts
    mine = parts_of(kept, sampled, d_r, d_t, "kept")
    sizes = [size for size, _ in mine]
    assert sum(sizes) == kept and max(sizes) - min(sizes) <= 1 and {scale for _, scale in mine} == {1.0}


def test_overlong_penalty_falls_from_the_buffer_to_the_limit() -> None:
    lengths = np.array([[10, 80, 90, 100]])
    assert overlong_penalty(lengths, limit=100, buffer=20).tolist() == [[0, 0, -0.5, -1]]
    with pytest.raises(ValueError, match="between 1 and the response limit 100"):
        overlong_penalty(lengths, limit=100, buffer=101)


def plateau(**settings: float) -> StageConfig:
    return StageConfig(**STAGE | {"until": "plateau", "plateau_evals": 2, "plateau_gain": 0.01} | settings)


@pytest.mark.parametrize(
    ("accuracy", "truncated", "flat"),
    [
        ([0.5, 0.6, 0.6, 0.6, 0.602], [0.3, 0.1, 0.1, 0.1, 0.1], True),
        ([0.5, 0.59, 0.6, 0.61, 0.62], [0.3, 0.1, 0.1, 0.1, 0.1], False),  # accuracy still rises
        ([0.5, 0.6, 0.6, 0.6, 0.6], [0.3, 0.3, 0.2, 0.1, 0.1], False),  # truncation still falls
        ([0.5, 0.6, 0.55, 0.65, 0.6], [0.1] * 5, False),  # noise in which a rise may hide
        ([0.5, 0.6, 0.6], [0.3, 0.1, 0.1], False),  # too few to tell
        ([0.6, 0.59, 0.58, 0.57, 0.56], [0.1, 0.1, 0.2, 0.3, 0.4], True),  # a loss is no gain
        ([0.5, 0.5, 0.5, 0.5], [math.nan, 0.1, 0.1, 0.1], True),
        ([0.5, math.nan, math.nan, math.nan], [0.1, 0.1, 0.1, 0.1], True),
    ],
)
def test_a_plateau_is_flat_in_accuracy_and_in_truncation(
    accuracy: list[float], truncated: list[float], flat: bool
) -> None:
    history = [(i, a, t) for i, (a, t) in enumerate(zip(accuracy, truncated, strict=True))]
    assert has_plateaued(history, plateau()) is flat


def note(progress: Stages, step: int, accuracy: float) -> None:
    """Record a step without truncation and an evaluation after the step."""
    progress.cut.append(0.0)
    progress.note_evaluation(step, accuracy)


def test_stages_hand_over_by_steps_or_by_plateau_and_survive_a_checkpoint() -> None:
    stages = [STAGE | {"steps": 3}, plateau().model_dump() | {"steps": 9}, STAGE | {"steps": 2}]
    config = config_of().model_copy(update={"stage": tuple(StageConfig(**s) for s in stages)})
    progress, seen = Stages(config), []
    for step in range(1, 15):
        if progress.finished:
            break
        seen.append(progress.index)
        note(progress, step, 0.5)
        state = json.loads(json.dumps(progress.state_dict()))
        progress = Stages(config)
        progress.load_state(state)
        progress.advance(step)
    # The second stage is flat from the evaluation on that it begins with: two windows of two have that and three more.
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2]
    with pytest.raises(IndexError, match="all 3 stages are done"):
        progress.step(9)
    progress = Stages(config)
    assert [progress.step(number).stage_index for number in (1, 3, 4)] == [0, 0, 1]
    progress.advance(3)
    assert progress.steps_left(5) == 7 + 2


def resumed(before: list[dict], after: list[dict], steps: int, accuracy: float = 0.5) -> tuple[Stages, str]:
    """Return where a run of `steps` steps under the stages `before` resumes under `after`, and its messages."""
    old, new = (config_of().model_copy(update={"stage": tuple(StageConfig(**s) for s in s)}) for s in (before, after))
    before, after = Stages(old), Stages(new)
    for step in range(1, steps + 1):
        note(before, step, accuracy)
        before.advance(step)
    after.load_state(before.state_dict())
    return after, after.resume(steps) or ""


def test_a_finished_run_goes_on_where_its_last_stage_has_become_longer() -> None:
    one, two, three = (STAGE | {"steps": n} for n in (1, 2, 3))
    flat = plateau().model_dump() | {"steps": 9}
    for after in ([one, two], [one, one]):
        progress, said = resumed([one, two], after, 3)
        assert said == "" and progress.index == 2
    progress, said = resumed([one, two], [one, three], 3)
    assert "stage 2 continues, up to 3 steps" in said
    assert (progress.index, progress.now.began, progress.now.history[1:]) == (1, 1, [(2, 0.5, 0.0), (3, 0.5, 0.0)])
    assert resumed([one, two], [one, two, one], 3)[0].index == 2, "a stage more"
    progress, said = resumed([flat], [flat | {"steps": 20}], 4)
    assert progress.index == 1 and "has ended: over 2 evaluations accuracy" in said
    assert resumed([flat], [flat | {"until": "steps"}], 4)[0].index == 0
    progress, said = resumed([three, two], [two, two], 2)
    assert (progress.index, progress.now.began) == (1, 2) and "stage 1 ends with step 2: its 2 steps are done" in said


def heard(entropies: list[float], config: Config) -> dict[int, str]:
    watch, stage = EntropyWatch(), config.stage[0]
    said = {}
    for step, entropy in enumerate(entropies, 1):
        state, watch = watch.state_dict(), EntropyWatch()
        watch.load_state(state)
        if (message := watch.note(step, entropy, config, stage)) is not None:
            said[step] = message
    return said


def test_a_collapse_is_named_once_with_the_settings_that_cause_it() -> None:
    config = config_of({"minibatch_prompts": 1}, rollout={"temperature": 0.6})
    said = heard([1.0] * BASELINE_STEPS + [0.05] * (REPEAT + PATIENCE - 1), config)
    assert list(said) == [BASELINE_STEPS + PATIENCE]
    for part in ("collapsed, 1 -> 0.05", "minibatch_prompts = prompts_per_step", 'control = "adaptive"', "temperature"):
        assert part in said[BASELINE_STEPS + PATIENCE]


def test_an_explosion_is_named_and_noise_is_not() -> None:
    config = config_of(loss={"clip_high": 0.28, "entropy": {"control": "constant", "coef": 0.01}})
    said = heard([0.2] * BASELINE_STEPS + [0.9] * PATIENCE, config)
    assert len(said) == 1
    assert "exploded" in next(iter(said.values())) and "loss.entropy.coef = 0.01" in next(iter(said.values()))
    assert "clip_high = 0.28" in next(iter(said.values()))
    assert not heard([0.2] * BASELINE_STEPS + [0.9, 0.9, 0.2, 0.9, 0.9, 0.05, 0.01] * 3, config)


def test_entropy_that_a_controller_was_asked_to_raise_is_no_explosion() -> None:
    """From 0.06 to the target 0.2, which is more than three times the start; a rise beyond that is reported."""
    asked = config_of(loss={"entropy": {"control": "adaptive", "target": 0.2}})
    assert not heard([0.06] * BASELINE_STEPS + [0.2, 0.25] * PATIENCE, asked)
    said = heard([0.06] * BASELINE_STEPS + [0.7] * PATIENCE, asked)
    assert len(said) == 1 and "exploded" in next(iter(said.values()))
    assert heard([0.06] * BASELINE_STEPS + [0.2] * PATIENCE, config_of()), "without control nobody asked for it"
