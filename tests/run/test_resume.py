"""Data that changed, state that does not fit, open responses: the run resumes, or names the problem."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1.core.files import SEAL
from or1.core.types import OpenGroup
from or1.data import SamplerState
from or1.dist.oom_retry import RowBudget
from or1.dist.watchdog import Watchdog
from or1.dist.world import SINGLE
from or1.report.rank_display import RankDisplay
from or1.run.in_flight import InFlight
from or1.train.build import Parts, build
from or1.trainer import Trainer
from tests.helpers.hand_run import EOS, ONE, ZERO, Unsolved, config_of, group, response, trainer_of


class Messages:
    """The messages of a run."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


def resumed(config: Any) -> tuple[Parts, list[str]]:
    messages = Messages()
    return build(config, RankDisplay(Watchdog(SINGLE, 60.0), messages), scorer=Unsolved()), messages.said


def save_with(config: Any, **state: Any) -> None:
    trainer = trainer_of(config)
    trainer.state.step = 1
    for name, value in state.items():
        setattr(trainer.state, name, value)
    save(trainer)


def save(trainer: Trainer) -> None:
    trainer.session.save()
    trainer.session._checkpoints.wait()


def test_data_that_shrank_begins_the_next_epoch_and_says_so(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    save_with(config, sampler=SamplerState(0, 2))
    (tmp_path / "train.jsonl").write_text('{"question": "1+1", "answer": "0"}\n')
    trainer, said = resumed(config)
    assert trainer.state.sampler == SamplerState(1, 0)
    assert any("the data has 1 prompts and 2 of the epoch were taken before; epoch 1 begins" in line for line in said)
    assert [prompt.id for prompt in trainer.rollouts._fresh(2)] == [trainer.data.prompts[0].id] * 2


UNFIT: list[tuple[str, Any]] = [
    ("step", -1),
    ("step", 40),
    ("odd", 1),
    ("state", []),
    ("tensors", {}),
    ("tensors", None),
    ("state.watch", KeyError),
    ("state.odd", 1),
    ("state.updates", "x"),
    ("state.updates", -1),
    ("state.policy_version", None),
    ("state.inputs", None),
    ("state.budget", {"max_tokens": -5}),
    ("state.budget", [1]),
    ("state.step", 1),
    ("state.totals", []),
    ("state.stages", {"index": None}),
    ("state.sampler", {"epoch": 0}),
    ("state.solved", {}),
    ("state.entropy", {"coef": "x"}),
    ("state.in_flight", {"groups": 3}),
]


@pytest.mark.parametrize(("name", "value"), UNFIT, ids=str)
def test_state_that_does_not_fit_is_told_and_the_checkpoint_before_is_used(
    name: str, value: Any, tmp_path: Path
) -> None:
    """Manifests of an older or1, which have no sha256 of their own."""
    config = config_of(tmp_path)
    for step in (1, 2):
        save_with(config, step=step)
    path = tmp_path / "run" / "checkpoints" / "step_2" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[SEAL]
    place, last = (manifest["state"], name.removeprefix("state.")) if "." in name else (manifest, name)
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(manifest))
    trainer, said = resumed(config)
    assert trainer.state.step == 1 and "resumed after step 1" in said
    assert any("step" in line and "falling back to the one before" in line for line in said)


@pytest.mark.parametrize("ahead", [False, True])
def test_open_responses_follow_their_prompts_and_go_with_them(ahead: bool, tmp_path: Path) -> None:
    from or1.rollout.collect import Rollout

    config = config_of(tmp_path)
    prompts = trainer_of(config).parts.data.prompts
    answers = (response(ZERO, ONE), response(ONE, EOS))
    carried = [OpenGroup(prompt, answers, (None, None)) for prompt in prompts]
    closed = [replace(group([1, 0], list(answers)), prompt=prompt) for prompt in prompts]
    rollout = Rollout(closed, 1.0, 2.0, list(carried)) if ahead else None

    def save_open() -> None:
        trainer = trainer_of(config)
        trainer.state.step = 1
        trainer.state.in_flight = InFlight(
            rollout
            and replace(
                rollout, groups=[replace(g, prompt=p) for g, p in zip(closed, trainer.parts.data.prompts, strict=True)]
            ),
            [replace(g, prompt=p) for g, p in zip(carried, trainer.parts.data.prompts, strict=True)],
        )
        save(trainer)

    save_open()
    rows = [{"question": question, "answer": "0"} for question in ("9+9", "1+3", "1+1")]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    trainer, said = resumed(config)
    in_flight = trainer.state.in_flight
    # By their tokens: the id of a prompt may be its line.
    texts = [g.prompt.token_ids.tolist() for g in in_flight.carried]
    assert texts == [prompts[0].token_ids.tolist(), prompts[2].token_ids.tolist()]
    assert [g.prompt for g in in_flight.carried] == [trainer.data.prompts[2], trainer.data.prompts[1]]
    assert all(np.array_equal(g.responses[0].token_ids, answers[0].token_ids) for g in in_flight.carried)
    if ahead:
        assert [g.prompt for g in in_flight.ahead.groups] == [trainer.data.prompts[2], trainer.data.prompts[1]]
        assert in_flight.ahead.groups[0].scores == closed[0].scores
    assert f"{2 if ahead else 1} groups under way are dropped" in "\n".join(said)


@pytest.mark.parametrize("partial", [None, 4])
def test_what_a_stage_began_does_not_enter_the_next_after_a_resume_with_fewer_steps(
    partial: int | None, tmp_path: Path
) -> None:
    # The next stage may have another temperature, to which the log-probs of these responses do not belong.
    from or1.rollout.collect import Rollout

    rollout = {"partial_tokens": partial, "overlap": partial is None}
    config = config_of(tmp_path, ({"steps": 3}, {}), rollout={"engine": "hf", **rollout})
    trainer = trainer_of(config)
    prompts, answers = trainer.parts.data.prompts, (response(ZERO, ONE), response(ONE, EOS))
    carried = [OpenGroup(prompts[0], answers, (None, None))]
    closed = [replace(group([1, 0], list(answers)), prompt=prompts[1])]
    trainer.state.step, trainer.state.in_flight = 1, InFlight(Rollout(closed, 1.0, 2.0, list(carried)), carried)
    save(trainer)
    same, _ = resumed(config)
    assert same.state.in_flight.ahead is not None and len(same.state.in_flight.carried) == 1
    shorter = config.model_copy(update={"stage": (config.stage[0].model_copy(update={"steps": 1}), config.stage[1])})
    parts, said = resumed(shorter)
    assert parts.state.stages.index == 1 and parts.state.in_flight.ahead is None
    assert len(parts.state.in_flight.carried) == (partial is not None)
    assert f"{2 - (partial is not None)} groups under way are dropped: stage 1, in which they" in "\n".join(said)


def test_open_responses_of_an_older_or1_go_by_their_place(tmp_path: Path) -> None:
    trainer = trainer_of(config_of(tmp_path)).parts
    prompts = trainer.data.prompts
    open_groups = [OpenGroup(p, (response(ZERO),), (None,)) for p in prompts]
    state, tensors = InFlight(None, open_groups).to_checkpoint(prompts)
    state["groups"] = [each[:2] for each in state["groups"]]
    found = InFlight.from_checkpoint(state, tensors, prompts[:2], trainer.tokenizer)
    assert [g.prompt for g in found.carried] == list(prompts[:2]) and found.lost == 1


def test_a_lowered_budget_holds_a_longer_sequence_that_comes_later() -> None:
    budget = RowBudget(100)
    budget.max_tokens = 24
    assert [[attempt.max_tokens for attempt in budget.attempts(longest)] for longest in (40, 10)] == [[40], [24]]
    assert budget.max_tokens == 24
