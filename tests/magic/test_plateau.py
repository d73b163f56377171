"""When a stage hands over by itself: neither the report's own rate of progress nor noise may pass for a plateau."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from or1.config import StageConfig
from or1.magic.plateau import eval_level, has_plateaued
from or1.magic.stages import Stages
from tests.helpers.hand_run import config_of, run_of, trainer_of

STAGE = StageConfig(steps=740, max_response_tokens=8, prompts_per_step=4, group_size=2, until="plateau")
EVERY = 20
"""Steps between evaluations, as in the recipes."""
NOISE = 0.015
"""Of a mean of AIME avg@8: 60 problems of 8 samples each, whose outcomes vary by about a third."""


def ends_at(accuracies: np.ndarray, truncated: float = 0.1) -> int | None:
    """Return the step at which a stage with these evaluations, one every 20 steps, ends, or None."""
    history = [(k * EVERY, float(a), truncated) for k, a in enumerate(accuracies)]
    return next((p[0] for k, p in enumerate(history) if has_plateaued(history[: k + 1], STAGE)), None)


def evaluations(per_100_steps: float, steps: int = 740) -> np.ndarray:
    return 0.5 + per_100_steps / 100 * np.arange(0, steps + 1, EVERY)


@pytest.mark.parametrize("points", [0.66, 1.0, 3.0])
def test_a_steady_rise_is_no_plateau(points: float) -> None:
    """0.66 points per 100 steps are the report's own rate, from 55.5 to 69.8 in 2,160 steps."""
    assert ends_at(evaluations(points / 100)) is None


def test_noise_does_not_end_a_stage_that_rises() -> None:
    """Of 100 stages that gain 2 points per 100 steps hardly one ends early; by the best evaluation so far half did."""
    rng = np.random.default_rng(5)
    ended = [ends_at(evaluations(0.02) + rng.normal(0, NOISE, 38)) for _ in range(100)]
    assert sum(step is not None for step in ended) <= 2


def test_a_plateau_is_found_through_noise_and_at_once_without() -> None:
    """Two windows of six evaluations are the least; noise costs some more, and no stage of 2,000 steps misses it."""
    assert ends_at(evaluations(0.0)) == 11 * EVERY
    rng = np.random.default_rng(6)
    ended = [ends_at(evaluations(0.0, 2000) + rng.normal(0, NOISE, 101)) for _ in range(50)]
    assert all(step is not None for step in ended) and np.median(ended) < 700


def test_truncation_that_still_falls_keeps_a_stage() -> None:
    history = [(k * EVERY, 0.5, 0.4 - 0.005 * k) for k in range(12)]
    assert not has_plateaued(history, STAGE)
    assert has_plateaued([(step, a, 0.1) for step, a, _ in history], STAGE)


def test_truncation_is_that_of_all_steps_between_two_evaluations(tmp_path: Path) -> None:
    """The evaluation before training is the first. A single step says little, and none where no group was completed."""
    trainer = trainer_of(config_of(tmp_path, [{"steps": 9, "until": "plateau"}]))
    seen = {"eval/test/avg@1": 0.5}
    trainer.state.stages.finish_step(0, seen)
    for step, cut in enumerate((0.2, 0.4, math.nan), 1):
        trainer.state.stages.finish_step(step, {"completion/truncated": cut})
    trainer.state.stages.load_state(json.loads(json.dumps(trainer.state.stages.state_dict())))
    trainer.state.stages.finish_step(4, {"completion/truncated": 0.6} | seen)
    trainer.state.stages.finish_step(5, {"completion/truncated": 1.0} | seen)
    (first, *rest) = trainer.state.stages.now.history
    assert first[:2] == (0, 0.5) and math.isnan(first[2])
    assert [step for step, _, _ in rest] == [4, 5]
    assert [cut for _, _, cut in rest] == pytest.approx([(0.2 + 0.4 + 0.6) / 3, 1.0])


def test_a_run_notes_the_evaluation_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    held_out = [{"name": "s", "path": str(tmp_path / "train.jsonl")}]
    config = config_of(tmp_path, [{"steps": 2}], reward={"workers": 1}, eval={"sets": held_out, "every_steps": 1})
    former = run_of(config).state.stages.former
    assert [step for step, _, _ in former.history] == [0, 1, 2]


def test_the_next_stage_begins_with_the_evaluation_that_ended_the_last(tmp_path: Path) -> None:
    config = config_of(tmp_path, [{"steps": 2}, {"steps": 3}])
    progress = Stages(config)
    for step in (1, 2):
        progress.cut.append(0.5)
        progress.note_evaluation(step, step / 10)
        progress.advance(step)
    ((step, level, cut),) = progress.now.history
    assert (progress.index, step, level) == (1, 2, 0.2) and math.isnan(cut), "its truncation is not known yet"


def test_a_graded_set_says_its_mean_reward() -> None:
    """Accuracy counts rewards of at least 1, so it may stand still while rewards rise from 0.2 to 0.8."""
    plain = {"eval/a/avg@8": 0.5, "eval/a/reward_mean": 0.4, "time/eval": 1.0}
    graded = {"eval/b/avg@1": 0.0, "eval/b/reward_mean": 0.3, "eval/b/graded": 0.9}
    assert eval_level(plain) == 0.5 and eval_level(graded) == 0.3
    assert eval_level(plain | graded) == pytest.approx(0.4)
    assert eval_level({"time/eval": 1.0}) is None
    assert math.isnan(eval_level({"eval/b/avg@1": 0.0, "eval/b/graded": 0.9}))
