"""Rollouts made ahead (rollout.overlap) at the places where a stage may end."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest

from or1.config import Config
from or1.core.types import Prompt, Response, Score, Status
from or1.trainer import Trainer
from tests.helpers.hand_run import config_of, trainer_of

AHEAD = {"rollout": {"overlap": True, "engine": "hf"}, "loss": {"is_cap": 2.0}}


class OneSolved:
    """A scorer for which all responses to the first prompt are right, and all others wrong; it keeps what it saw."""

    def __init__(self) -> None:
        self.first = ""
        self.seen: list[tuple[str, int]] = []

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        self.seen.append((prompt.id, len(response.token_ids)))
        right = prompt.id == self.first
        future: Future[Score] = Future()
        future.set_result(Score(float(right), Status.OK if right else Status.WRONG))
        return future


def steps(config: Config, count: int, evaluation: dict[str, float] | None = None) -> tuple[Trainer, list[bool]]:
    """Return a trainer after so many steps, and for each step whether the next rollout was made."""
    config.run_path.mkdir(parents=True, exist_ok=True)
    scorer = OneSolved()
    trainer = trainer_of(config, scorer)
    trainer.scorer, scorer.first = scorer, trainer.parts.data.prompts[0].id
    ahead = []
    for number in range(1, count + 1):
        step = trainer.state.stages.step(number)
        trainer.learn(step, trainer.sample(step))
        trainer.state.step = number
        ahead.append(trainer.state.in_flight.ahead is not None)
        trainer.state.stages.finish_step(number, (evaluation or {}) if number % config.eval.every_steps == 0 else {})
    trainer.rollouts.close()
    return trainer, ahead


def test_a_stage_does_not_train_on_prompts_that_were_dropped_at_its_start(tmp_path: Path) -> None:
    stages = [{"steps": 2, "prompts_per_step": 3}, {"steps": 2, "prompts_per_step": 6, "max_response_tokens": 2}]
    trainer, ahead = steps(config_of(tmp_path, stages, data={"drop_solved": True}, **AHEAD), 3)
    assert ahead == [True, False, True], "the rollout of step 3 waits for its stage, that of step 4 does not"
    scorer = trainer.scorer
    assert trainer.state.solved.dropped == {scorer.first}
    later = scorer.seen[2 * 3 * 2 :]
    assert len(later) == 2 * 6 * 2 and scorer.first not in {name for name, _ in later}
    assert max(tokens for _, tokens in later) <= 2


@pytest.mark.parametrize(("until", "ahead"), [("steps", [True] * 5), ("plateau", [True, True, True, False, True])])
def test_an_evaluation_that_may_find_a_plateau_is_waited_for(until: str, ahead: list[bool], tmp_path: Path) -> None:
    """Evaluations after steps 2 and 4; the second is the first that two windows of one can be looked at with."""
    stage = {"steps": 9, "until": until, "plateau_evals": 1, "plateau_gain": 0.5}
    config = config_of(tmp_path, [stage, {}], eval={"every_steps": 2}, **AHEAD)
    trainer, found = steps(config, 4, {"eval/s/avg@1": 0.5})
    assert found == ahead[:4]
    assert trainer.state.stages.index == (until == "plateau")
