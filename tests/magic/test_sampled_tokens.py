"""What is estimated from sampled tokens, and settings under which such an estimate would say something else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from or1.config import Config
from or1.config.rules import contradictions
from or1.core.types import Group
from or1.report.page_data import RecordedRun
from or1.report.page_plots import render_plots
from tests.helpers.hand_run import EOS, ONE, ZERO, config_of, group, learn, response, trainer_of

STAGE = {"steps": 1, "max_response_tokens": 8, "prompts_per_step": 4, "group_size": 2}
NUCLEUS, LIKELIEST = {"top_p": 0.9}, {"top_k": 20}


def problems_of(rollout: dict, **loss: object) -> dict[str, str]:
    config = Config.model_validate(
        {
            "run_dir": "r",
            "model": {"path": "o/m"},
            "data": {"train": ["t"]},
            "stage": [STAGE],
            "rollout": rollout,
            "loss": loss,
        }
    )
    return dict(contradictions(config, files=False))


@pytest.mark.parametrize("engine", ["auto", "vllm"])
@pytest.mark.parametrize("truncated", [NUCLEUS, LIKELIEST])
def test_old_log_probs_of_the_engine_need_the_whole_distribution(engine: str, truncated: dict) -> None:
    (where,) = (f"rollout.{name}" for name in truncated)
    said = problems_of(truncated | {"engine": engine}, old_logp="rollout")
    assert list(said) == [where] and "every ratio would be multiplied" in said[where]
    assert not problems_of(truncated | {"engine": "hf"}, old_logp="rollout"), "it reports those among all tokens"
    assert not problems_of(truncated | {"engine": engine}) and not problems_of({"engine": engine}, old_logp="rollout")


@pytest.mark.parametrize("engine", ["hf", "vllm"])
@pytest.mark.parametrize("truncated", [NUCLEUS, LIKELIEST])
def test_adaptive_control_needs_tokens_of_the_whole_distribution(engine: str, truncated: dict) -> None:
    (where,) = (f"rollout.{name}" for name in truncated)
    said = problems_of(truncated | {"engine": engine}, entropy={"control": "adaptive"})
    assert list(said) == [where] and "target would not be held" in said[where]
    assert not problems_of(truncated | {"engine": engine}, entropy={"control": "constant", "coef": 1e-3})
    assert not problems_of({"engine": engine}, entropy={"control": "adaptive"})


def halves(entropy: float) -> Group:
    return group([1, 0], [response(ZERO, EOS, entropy=entropy)] * 2, "mixed")


def solved(entropy: float, tokens: int = 2) -> Group:
    return group([1, 1], [response(*[ZERO] * tokens, entropy=entropy)] * 2, "solved")


@pytest.mark.parametrize(("measure", "e_k"), [("kept", 0.5), ("all", (4 * 0.5 + 12 * 0.1) / 16)])
def test_entropy_is_that_of_kept_or_of_all_sampled_tokens(measure: str, e_k: float, tmp_path: Path) -> None:
    """4 kept tokens of 0.5 nats and 12 of 0.1 in a solved group: 0.5 or 0.2, on either side of the target 0.3."""
    entropy = {"control": "adaptive", "variant": "paper", "target": 0.3, "coef": 0.004, "measure": measure}
    trainer = trainer_of(config_of(tmp_path, loss={"entropy": entropy}))
    metrics = learn(trainer, halves(0.5), solved(0.1, 6))
    assert metrics["policy/entropy_all"] == pytest.approx(0.2) and metrics["policy/entropy"] == pytest.approx(e_k)
    assert metrics["policy/entropy_coef"] == (0.004 if measure == "all" else 0.0)


def test_the_alarm_hears_a_collapse_that_kept_groups_hide(tmp_path: Path) -> None:
    """One group stays mixed at 0.3 nats while the solved ones fall from 0.3 to 0.01; then nothing is kept at all."""
    trainer = trainer_of(config_of(tmp_path))
    told: list[str] = []
    trainer.display.message = told.append
    for step in range(1, 6):
        learn(trainer, halves(0.3), solved(0.3, 40), step=step)
    for step in range(6, 9):
        learn(trainer, halves(0.3), solved(0.01, 400), step=step)
    for step in (9, 10):
        metrics = learn(trainer, solved(0.01), step=step)
        assert metrics["policy/entropy_all"] == pytest.approx(0.01) and "policy/entropy" not in metrics
    assert [text for text in told if "entropy collapsed" in text], told
    assert trainer.state.totals["entropy_alarms"] == 1


def test_a_step_without_a_complete_group_has_no_entropy(tmp_path: Path) -> None:
    trainer = trainer_of(config_of(tmp_path))
    assert "policy/entropy_all" not in learn(trainer) and not trainer.state.watch.first


@pytest.mark.parametrize(("loss", "moves"), [({}, False), ({"old_logp": "rollout"}, True)])
def test_mismatch_is_of_engine_and_trainer_not_of_the_policys_movement(loss: dict, moves: bool, tmp_path: Path) -> None:
    """The engine's log-probs are the policy's own. The second update of a rollout compares with those before the first,

    where they are known; what the engine said is all that is known with old_logp = "rollout".
    """
    trainer = trainer_of(config_of(tmp_path, [{"reuse": 2}], optim={"lr": 1e-2}, loss=loss))
    sampled = [response(ZERO, entropy=math.log(2)), response(ONE, entropy=math.log(4))]
    metrics = learn(trainer, group([1, 0], sampled))
    assert metrics["policy/ratio_mean"] != 1.0, "the first update moved the policy"
    assert (metrics["mismatch/kl"] > 1e-9) is moves and (metrics["mismatch/ratio_max"] > 1 + 1e-5) is moves


@pytest.mark.parametrize("recorded", [True, False])
def test_the_report_draws_the_entropy_of_all_sampled_tokens(recorded: bool, tmp_path: Path) -> None:
    """A run from before that metric has the one line that it recorded."""
    record = {"step": 1, "stage": 0, "policy/entropy": 0.3} | ({"policy/entropy_all": 0.1} if recorded else {})
    plots, _ = render_plots(RecordedRun(path=tmp_path, config=None, raw_config={}, records=(record,), notes=()))
    (entropy,) = [plot for plot in plots if plot.title == "Entropy"]
    assert [entry.label for entry in entropy.legend] == ["entropy", *["all sampled"] * recorded]
