"""Rollouts made ahead (rollout.max_staleness, overlap): how far, where a stage may end, after a resume or a failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1.config import Config
from or1.core.errors import EngineError, RunError
from or1.core.seeds import seed_of
from or1.core.types import Group, OpenGroup, Prompt, Response, Score, Status
from or1.dist.world import SINGLE
from or1.magic.stages import Stages, Step
from or1.rollout.collect import Rollout
from or1.rollout.engine import Sampling
from or1.train.making import Making, Part
from or1.trainer import Trainer
from tests.helpers.hand_run import config_of, trainer_of
from tests.helpers.typist import Typist

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


def stale(tmp_path: Path, k: int, stages: list[dict[str, object]], **sections: Any) -> Trainer:
    """Return a trainer whose engine is a `Typist`."""
    rollout = {"max_staleness": k, "engine": "hf", "verify_every": 0}
    config = config_of(tmp_path, stages, rollout=rollout, loss={"is_cap": 2.0} | sections.pop("loss", {}), **sections)
    config.run_path.mkdir(parents=True, exist_ok=True)
    trainer = trainer_of(config, sections.get("scorer"))
    engine = Typist(trainer.parts.tokenizer)
    engine.version = trainer.state.policy_version
    trainer.engine = trainer.rollouts._engine = engine
    return trainer


def one_step(trainer: Trainer, before_training: Callable[[], None] = lambda: None) -> tuple[Rollout, dict[str, float]]:
    step = trainer.state.stages.step(trainer.state.step + 1)
    rollout = trainer.sample(step)
    while not all(making._calls or making.future.done() for making in trainer.rollouts._making.values()):
        time.sleep(0.001)  # Their threads have not begun yet.
    before_training()
    metrics = trainer.learn(step, rollout)
    trainer.state.step = step.number
    trainer.state.stages.finish_step(step.number, {})
    return rollout, metrics


def ids_of(rollout: Rollout) -> list[str]:
    return [group.prompt.id for group in rollout.groups]


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_rollouts_are_made_at_most_k_steps_ahead_in_the_same_order(k: int, tmp_path: Path) -> None:
    trainer = stale(tmp_path, k, [{"steps": 7}])
    prompts, staleness = [], []
    for number in range(1, 8):
        rollout, metrics = one_step(trainer)
        prompts.append(ids_of(rollout))
        staleness.append(metrics["policy/staleness_max"])
        if k > 1:
            assert sorted(trainer.rollouts._making) == list(range(number + 1, min(number + k, 7) + 1))
    # The version at the start of each rollout: as early as the bound allows, and no earlier.
    assert [version for _, version, _ in trainer.engine.calls] == [max(0, m - 1 - k) for m in range(1, 8)]
    assert max(staleness) <= k and staleness[0] == 0 and (k > 1 or staleness[1:] == [k] * 6)
    order = seeds(trainer, 7)
    all_prompts = [prompt.id for prompt in trainer.parts.data.prompts]
    assert len(prompts) == 7 and sorted({p for step in prompts for p in step}) == all_prompts
    assert prompts == [ids for _, _, ids in sorted(trainer.engine.calls, key=lambda call: order.index(call[0]))]
    trainer.rollouts.close()


def seeds(trainer: Trainer, count: int) -> list[int]:
    return [seed_of(trainer.config.seed, number) for number in range(1, count + 1)]


def test_a_response_goes_on_under_the_next_weights_within_the_bound(tmp_path: Path) -> None:
    """Two prompts of two responses of six tokens a rollout: 24 tokens."""
    trainer = stale(tmp_path, 2, [{"steps": 6}])
    order, found = seeds(trainer, 6), []
    for number in range(1, 7):
        # The rollout of the next step is made to two thirds before a push, that of the step after it to a third.
        parts = {order[i]: n for i, n in ((number, 16), (number + 1, 8)) if i < 6}
        trainer.engine.limit(parts)
        found.append(one_step(trainer, trainer.engine.await_limits))
    for number, (rollout, metrics) in enumerate(found, 1):
        versions = [r.token_versions for g in rollout.groups for r in g.responses]
        own = np.concatenate(versions)
        assert all((np.diff(v) >= 0).all() and len(v) == 6 for v in versions)
        # A third by each policy; the first two rollouts begin under the first policy.
        assert own.tolist() == [max(number - 1 - age, 0) for age in (2, 1, 0) for _ in range(8)]
        assert any(len(set(v)) > 1 for v in versions) or number == 1
        assert metrics["policy/staleness_max"] == number - 1 - own.min() <= 2
        assert metrics["policy/staleness"] == pytest.approx(number - 1 - own.mean())
    trainer.rollouts.close()


def test_the_first_rollout_of_a_stage_waits_for_its_stage_whatever_k(tmp_path: Path) -> None:
    stages = [{"steps": 3, "prompts_per_step": 3}, {"steps": 2, "prompts_per_step": 2, "max_response_tokens": 2}]
    trainer = stale(tmp_path, 3, stages)
    for number in range(1, 4):
        one_step(trainer)
        assert len(trainer.engine.calls) == 3, f"step {number}: all of the first stage, none of the second"
    rollout, _ = one_step(trainer)
    assert len(trainer.engine.calls) == 5 and trainer.engine.calls[3][1] == 3
    assert {len(r.token_ids) for g in rollout.groups for r in g.responses} == {2}
    trainer.rollouts.close()


def test_the_evaluations_up_to_a_step_decide_whether_a_stage_may_end_there(tmp_path: Path) -> None:
    stage = {"steps": 9, "until": "plateau", "plateau_evals": 1, "plateau_gain": 0.5}
    stages = Stages(config_of(tmp_path, [stage, {}], eval={"every_steps": 2}))
    # The evaluations after steps 2 and 4 are still to come: two windows of one, so step 4 may be the last.
    assert [stages.may_end(number, done=0) for number in range(1, 6)] == [False, False, False, True, False]
    stages.note_evaluation(0, 0.5)
    assert [stages.may_end(number, done=0) for number in (2, 4)] == [True, True]


def test_an_engine_that_fails_in_a_later_rollout_ends_the_run_at_once(tmp_path: Path) -> None:
    trainer = stale(tmp_path, 2, [{"steps": 6}])
    trainer.engine.dies_at = seeds(trainer, 3)[2]
    with pytest.raises(EngineError, match="the server died"):
        for _ in range(3):
            one_step(trainer)
    assert trainer.state.step < 3
    trainer.rollouts.close()


def test_a_token_that_is_too_old_is_not_trained(tmp_path: Path) -> None:
    trainer = stale(tmp_path, 2, [{"steps": 6}])
    trainer.state.policy_version = 5
    with pytest.raises(RunError, match=r"tokens of policy 0, but rollout\.max_staleness = 2 allows 3 and later"):
        one_step(trainer)
    trainer.rollouts.close()


def test_rejected_groups_are_replaced_by_groups_of_the_present_weights(tmp_path: Path) -> None:
    """Every group is rejected, since every response is wrong: two rounds of two prompts."""
    trainer = stale(tmp_path, 2, [{"steps": 4}], loss={"refill_rounds": 2})
    for number in (1, 2):
        rollout, _ = one_step(trainer)
        versions = [r.version for g in rollout.groups for r in g.responses]
        assert len(rollout.groups) == 6 and versions[4:] == [number - 1] * 8
    trainer.rollouts.close()


def test_a_resumed_run_goes_on_with_what_was_in_the_making(tmp_path: Path) -> None:
    stages = [{"steps": 6}]
    trainer = stale(tmp_path, 2, stages)
    order = seeds(trainer, 3)
    trainer.engine.limit({order[1]: 20, order[2]: 3})
    first, _ = one_step(trainer, trainer.engine.await_limits)
    before = trainer.state.in_flight.making()
    assert [each.number for each in before] == [2, 3]
    lengths = [[len(r.token_ids) for g in each.groups for r in g.responses] for each in before]
    assert lengths == [[6, 6, 6, 2], [3, 0, 0, 0]]
    assert [type(group) for group in before[0].groups] == [Group, OpenGroup]
    trainer.session.save()
    trainer.session._checkpoints.wait()
    trainer.engine.close()
    trainer.rollouts.close()

    again = stale(tmp_path, 2, stages)
    assert again.state.step == 1 and [each.number for each in again.state.in_flight.begun] == [2, 3]
    found = [ids_of(first)]
    for each in before:
        rollout, metrics = one_step(again)
        found.append(ids_of(rollout))
        assert metrics["policy/staleness_max"] <= 2
        assert ids_of(rollout) == [group.prompt.id for group in each.groups]
        for old, new in zip(each.groups, rollout.groups, strict=True):
            for was, now in zip(old.responses, new.responses, strict=True):
                assert now.token_ids[: len(was.token_ids)].tolist() == was.token_ids.tolist()
                assert now.token_versions[: len(was.token_ids)].tolist() == was.token_versions.tolist()
                assert len(now.token_ids) == 6 and (np.diff(now.token_versions) >= 0).all()
    found += [ids_of(one_step(again)[0]) for _ in range(3)]
    straight = stale(tmp_path / "straight", 2, stages)
    assert found == [ids_of(one_step(straight)[0]) for _ in range(6)], "no prompt is lost, none comes twice"
    for each in (again, straight):
        each.rollouts.close()


@pytest.mark.parametrize("name", ["overlap", "max_staleness"])
def test_one_step_ahead_does_not_depend_on_time_nor_on_a_resume(name: str, tmp_path: Path) -> None:
    """With the embedded engine, whose policy here does not move: both names give the same samples."""

    def run(folder: Path, cut: int | None) -> list[list[list[int]]]:
        settings = {"rollout": {name: True if name == "overlap" else 1, "engine": "hf"}, "loss": {"is_cap": 2.0}}
        trainer, found = trainer_of(config_of(folder, [{"steps": 4}], **settings)), []
        trainer.config.run_path.mkdir(parents=True, exist_ok=True)
        for number in range(1, 5):
            rollout, _ = one_step(trainer)
            found.append([r.token_ids.tolist() for g in rollout.groups for r in g.responses])
            if number == cut:
                trainer.session.save()
                trainer.session._checkpoints.wait()
                trainer.rollouts.close()
                trainer = trainer_of(trainer.config)
                assert trainer.state.in_flight.ahead is not None
        return found

    straight = run(tmp_path / "straight", None)
    assert straight == run(tmp_path / "killed", 2)
    EXPECTED.setdefault("samples", straight)
    assert straight == EXPECTED["samples"]


EXPECTED: dict[str, Any] = {}


def test_ranks_that_make_parts_of_a_rollout_save_all_of_it(tmp_path: Path) -> None:
    prompts = [Prompt(f"p{i}", "s", "", np.array([7 + i], np.int32)) for i in range(3)]
    step = Step(number=4, stage_index=1, stage=config_of(tmp_path).stage[0], seed=0)
    done, score = Response(np.array([5, 1], np.int32), np.zeros(2, np.float32), "stop", 3, "0"), Score(1.0, Status.OK)
    making = Making(step, prompts, Sampling(1.0, 6, 2, 0))
    ranks: list[list[Part]] = [[(0, 0, done, score), (0, 1, done, score)], [(1, 1, done, None)]]
    begun = making.begun((part for rank in ranks for part in rank), 3)
    assert (begun.number, begun.stage_index) == (4, 1)
    assert begun.groups[0] == Group(prompts[0], (done, done), (score, score))
    half, nothing = begun.groups[1:]
    assert [len(r.token_ids) for r in half.responses] == [0, 2] and half.scores == (None, None)
    assert [len(r.token_ids) for r in nothing.responses] == [0, 0]
    resumed = Making(step, begun.groups, Sampling(1.0, 6, 2, 1))
    assert resumed.carried == [half, nothing] and resumed.prompts == []
    share = Rollout([Group(p, (done, done), (score, score)) for p in prompts[1:]], 1.0, 1.0)
    assert [group.prompt for group in resumed.whole(SINGLE, share).groups] == prompts
