"""Settings of a stage in a run: loss, learning rate, temperature, controller, reference; and a resume between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1.config import Config
from or1.dist.watchdog import Watchdog
from or1.dist.world import SINGLE
from or1.magic.stages import Step
from or1.report.rank_display import RankDisplay
from or1.rollout.collect import Rollout
from or1.run.metrics_log import read_metrics
from or1.train.build import Parts, build
from or1.trainer import Trainer
from tests.helpers.hand_run import EOS, ONE, ZERO, config_of, group, response, run_of, save_policy, trainer_of


def learn(trainer: Trainer, number: int, *rewards: float) -> dict[str, float]:
    """Train step `number` of its stage on two responses of equal odds, as the session would."""
    state = trainer.state
    step: Step = state.stages.step(number)
    found = [response(ZERO), response(ONE)]
    metrics = trainer.learn(step, Rollout([group(list(rewards), found)], 0.0, 0.0), replayed=True)
    state.step = number
    state.stages.advance(number)
    return metrics


def test_a_term_of_one_stage_is_in_its_loss_alone(tmp_path: Path) -> None:
    """Use the KL term of test_report_conflicts, worth 0.25 * kl_coef; the advantages cancel."""
    other = save_policy(tmp_path / "reference", {ZERO: 0.25, ONE: 0.5, EOS: 0.25})
    kl = {"loss": {"kl_coef": 0.1}, "optim": {"lr": 2e-15}}
    config = config_of(tmp_path, [{}, kl, {}], loss={"reference": str(other)})
    trainer = trainer_of(config)
    assert trainer.reference._held is None, "the first stage has no KL term"
    held, losses, rates = [], [], []
    for number in (1, 2, 3):
        metrics = learn(trainer, number, 1, 0)
        held.append(trainer.reference._held is not None)
        losses.append(metrics["optim/loss"])
        rates.append(metrics["optim/lr"])
    assert losses == pytest.approx([0.0, 0.025, 0.0], abs=1e-9)
    assert held == [False, True, False]
    assert rates == [1e-15, 2e-15, 1e-15]


ADAPTIVE = {"control": "adaptive", "target": 5.0, "delta": 0.001, "coef_max": 0.01}


def coefficients(folder: Path, stages: list[dict[str, Any]], entropy: dict[str, Any]) -> list[float]:
    trainer = trainer_of(config_of(folder, stages, loss={"entropy": entropy}))
    return [learn(trainer, n, 1, 0)["policy/entropy_coef"] for n in range(1, 1 + 2 * len(stages))]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({}, [0.0, 0.001, 0.002, 0.003]),
        ({"coef": 0.004}, [0.0, 0.001, 0.004, 0.005]),
        ({"delta": 0.003}, [0.0, 0.001, 0.002, 0.005]),
        ({"coef_max": 0.0015}, [0.0, 0.001, 0.0015, 0.0015]),
        ({"control": "constant", "coef": 0.007}, [0.0, 0.001, 0.007, 0.007]),
        ({"control": "none"}, [0.0, 0.001, 0.0, 0.0]),
    ],
)
def test_the_controller_at_a_hand_over(second: dict[str, Any], expected: list[float], tmp_path: Path) -> None:
    stages = [{"steps": 2}, {"steps": 2, "loss": {"entropy": second}}]
    assert coefficients(tmp_path, stages, ADAPTIVE) == pytest.approx(expected)


def test_an_adaptive_stage_after_a_constant_one_starts_anew(tmp_path: Path) -> None:
    constant = {"steps": 2, "loss": {"entropy": {"control": "constant", "coef": 0.009}}}
    assert coefficients(tmp_path, [constant, {"steps": 2}], ADAPTIVE) == pytest.approx([0.009, 0.009, 0.0, 0.001])


def test_each_stage_samples_at_its_temperature_and_the_alarm_measures_anew(tmp_path: Path) -> None:
    """At temperature 1/2 the odds 1/2, 1/4, 1/4 become 2/3, 1/6, 1/6."""
    hot, cold = 1.5 * np.log(2), -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 6))
    wide = {"prompts_per_step": 3, "group_size": 64, "max_response_tokens": 2}
    trainer = trainer_of(config_of(tmp_path, [wide, wide | {"rollout": {"temperature": 0.5}}]))
    seen = []
    for number in (1, 2):
        step = trainer.state.stages.step(number)
        rollout = trainer.rollouts.take(step)
        logps = np.concatenate([r.logp for g in rollout.groups for r in g.responses])
        seen.append(-float(logps.mean()))
        trainer.state.watch.first = [9.0]
        metrics = trainer.learn(step, rollout, replayed=True)
        assert metrics.get("mismatch/kl", 0.0) < 1e-9
        assert trainer.state.watch.first[:1] != [9.0] or number == 1
        trainer.state.step = number
        trainer.state.stages.advance(number)
    assert seen == pytest.approx([hot, cold], abs=0.1)


def without_times(run: Path) -> list[dict[str, Any]]:
    skipped = ("time", "perf/")
    return [
        {k: v for k, v in line.items() if not k.startswith(skipped)} for line in read_metrics(run / "metrics.jsonl")
    ]


def one_step_of(config: Config) -> bool:
    """Resume a run, and stop it at the end of its next step. Return True if that was the last."""
    made: list[Parts] = []

    def stop() -> bool:
        return bool(made) and made[0].state.step > before

    with build(config, RankDisplay(Watchdog(SINGLE, 60.0), None), stop=stop) as parts:
        before = parts.state.step
        made.append(parts)
        return Trainer(parts).run()


@pytest.mark.slow
def test_a_resume_in_any_stage_repeats_the_run_bit_for_bit(tmp_path: Path) -> None:
    stages = [
        {"steps": 2},
        {
            "steps": 2,
            "loss": {"kl_coef": 0.1, "clip_high": 0.28, "entropy": {"coef": 0.003}},
            "rollout": {"temperature": 0.7},
            "optim": {"lr": 1e-3},
        },
        {"steps": 2, "loss": {"kind": "cispo", "entropy": {"control": "none"}}, "minibatch_prompts": 1},
    ]
    sections = {"optim": {"lr": 1e-2}, "loss": {"entropy": ADAPTIVE, "reject_zero_advantage": False}}
    runs = [tmp_path / "whole", tmp_path / "parts"]
    for folder in runs:
        (folder / "run").mkdir(parents=True)
    run_of(config_of(runs[0], stages, **sections))
    starts = 0
    while not one_step_of(config_of(runs[1], stages, **sections)):
        starts += 1
        assert starts < 6
    assert starts == 5
    first, second = (without_times(folder / "run") for folder in runs)
    assert [line["step"] for line in second] == list(range(7))
    assert first == second
    assert [line["optim/lr"] for line in second[1:]] == [1e-2, 1e-2, 1e-3, 1e-3, 1e-2, 1e-2]
