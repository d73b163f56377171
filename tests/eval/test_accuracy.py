"""avg@k, pass@k and their intervals against other ways to compute them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from or1.config import Config
from or1.core.types import Group, Prompt, Response, Score, Status
from or1.data import SolvedPrompts
from or1.eval.accuracy import Estimate, Outcome, by_source, pass_at_k, pass_ks, summarise_set
from or1.report.page_samples import kind_of
from or1.report.summary import summarise
from or1.reward.terms import is_solved
from or1.run.state import TrainState
from or1.train.metrics import rollout_metrics


def outcome(correct: int, samples: int = 4, source: str = "s") -> Outcome:
    return Outcome(
        source,
        samples,
        correct,
        correct / samples,
        10.0,
        1,
        {"ok": correct, "wrong": samples - correct},
        float(correct > 0),
    )


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (6, 0), (6, 2), (6, 6), (7, 3)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(samples: int, correct: int) -> None:
    right = [i < correct for i in range(samples)]
    for k in range(1, samples + 1):
        choices = list(itertools.combinations(right, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)
    with pytest.raises(ValueError, match="raise samples"):
        pass_at_k(samples, correct, samples + 1)


def test_pass_at_k_is_unbiased() -> None:
    generator, chance, samples = np.random.default_rng(0), 0.3, 8
    correct = generator.binomial(samples, chance, 20_000)
    for k in (1, 2, 4, 8):
        estimate = np.mean([pass_at_k(samples, int(c), k) for c in correct])
        assert estimate == pytest.approx(1 - (1 - chance) ** k, abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        rates = generator.beta(1, 1, 60)
        estimate = Estimate.of((generator.binomial(16, rates) / 16).tolist())
        inside += abs(estimate.value - 0.5) <= estimate.ci95
    assert 0.92 <= inside / 400 <= 0.98
    assert math.isnan(Estimate.of([0.5]).ci95)


def test_which_k() -> None:
    assert pass_ks(1) == [1] and pass_ks(4) == [1, 2, 4] and pass_ks(6) == [1, 2, 4, 6] and pass_ks(32)[-1] == 32
    assert pass_ks(8, (3, 1, 64)) == [1, 3]


def test_a_set_and_its_sources() -> None:
    outcomes = [outcome(4), outcome(0), outcome(2, source="t")]
    result = summarise_set("x", outcomes, [1, 4])
    assert (result.problems, result.samples, result.avg.value, result.truncated) == (3, 4, 0.5, 0.25)
    assert result.pass_at[1].value == pytest.approx(0.5) and result.pass_at[4].value == pytest.approx(2 / 3)
    assert result.statuses == {"ok": 6, "wrong": 6}
    assert result.metrics()["eval/x/avg@4"] == 0.5 and "eval/x/pass@1" in result.metrics()
    assert {name: len(found) for name, found in by_source(outcomes).items()} == {"s": 2, "t": 1}
    with pytest.raises(ValueError, match="no problems"):
        summarise_set("x", [], [1])


def test_half_of_the_tests_is_not_right() -> None:
    response = Response(np.arange(3, dtype=np.int32), np.zeros(3, np.float32), "length", 0, "")
    scores = (Score(0.5, Status.WRONG), Score(1.0, Status.OK), Score(0.0, Status.TRUNCATED))
    found = Outcome.of(Group(Prompt("i", "s", "q", np.arange(2), ("1",)), (response,) * 3, scores))
    assert (found.correct, found.samples, found.reward, found.tokens, found.truncated) == (1, 3, 0.5, 3.0, 3)


def of(*pairs: tuple[float, Status, str]) -> Group:
    responses = [Response(np.arange(3, dtype=np.int32), np.zeros(3, np.float32), end, 0, "") for _, _, end in pairs]
    scores = tuple(Score(reward, status) for reward, status, _ in pairs)
    return Group(Prompt("i", "s", "q", np.arange(2), ("1",)), tuple(responses), scores)


def test_evaluations_record_the_mean_reward_and_whether_rewards_are_graded() -> None:
    wrong, right = (0.0, Status.WRONG, "stop"), (1.0, Status.OK, "stop")
    half, none = (0.5, Status.OK, "stop"), (math.nan, Status.CRASH, "stop")
    graded = summarise_set("x", [Outcome.of(of(half, wrong)), Outcome.of(of(right, none))], [1])
    metrics = graded.metrics()
    assert metrics["eval/x/reward_mean"] == 0.625 and metrics["eval/x/graded"] == 0.25
    assert metrics["eval/x/reward_mean_ci95"] == pytest.approx(1.96 * np.std([0.25, 1.0], ddof=1) / math.sqrt(2))
    plain = summarise_set("x", [Outcome.of(of(right, wrong)), Outcome.of(of(right, none))], [1]).metrics()
    assert plain["eval/x/reward_mean"] == 0.75 and "eval/x/graded" not in plain
    assert math.isnan(summarise_set("x", [Outcome.of(of(none, none))], [1]).metrics()["eval/x/reward_mean"])


def test_a_response_without_think_close_is_not_a_truncated_one() -> None:
    cut, unclosed = (0.0, Status.TRUNCATED, "length"), (0.0, Status.TRUNCATED, "stop")
    metrics = summarise_set("x", [Outcome.of(of(cut, unclosed, unclosed, (1.0, Status.OK, "stop")))], [1]).metrics()
    assert metrics["eval/x/truncated"] == 0.25 and metrics["eval/x/no_think_close"] == 0.5
    step = rollout_metrics([of(cut, unclosed, unclosed, (1.0, Status.OK, "stop"))])
    assert (step["completion/truncated"], step["completion/no_think_close"], step["completion/count"]) == (0.25, 0.5, 4)
    assert step["reward/status/truncated"] == 0.75


def test_a_step_records_the_spread_of_its_rewards() -> None:
    group = of(*((n / 10, Status.OK, "stop") for n in range(11)))
    metrics = rollout_metrics([group])
    assert [metrics[f"reward/p{q}"] for q in (10, 50, 90)] == pytest.approx([0.1, 0.5, 0.9])
    assert metrics["reward/graded"] == pytest.approx(9 / 11)
    assert rollout_metrics([of((1.0, Status.OK, "stop"), (0.0, Status.WRONG, "stop"))])["reward/graded"] == 0


@pytest.mark.parametrize(("reward", "solved"), [(0.0, False), (0.5, False), (0.999, False), (1.0, True), (1.5, True)])
def test_solved_means_the_same_everywhere(reward: float, solved: bool) -> None:
    group = of(*[(reward, Status.OK if reward else Status.WRONG, "stop")] * 2)
    outcome = Outcome.of(group)
    prompts = SolvedPrompts()
    prompts.note([group])
    row = {"reward": reward, "finish": "stop"}
    found = (
        outcome.correct == 2,
        pass_at_k(2, outcome.correct, 1) == 1,
        prompts.always["i"],
        is_solved(reward),
        rollout_metrics([group])["group/solved"] == 1,
        kind_of(row) == "solved",
    )
    assert found == (solved,) * 6


def test_crashes_and_timeouts_of_an_evaluation_are_recorded() -> None:
    failing = replace(outcome(2), statuses={"ok": 2, "crash": 1, "timeout": 1})
    metrics = summarise_set("x", [failing, replace(outcome(3), statuses={"ok": 3, "crash": 1})], [1]).metrics()
    assert (metrics["eval/x/crash"], metrics["eval/x/timeout"]) == (0.25, 0.125)
    assert not {"eval/x/crash", "eval/x/timeout"} & summarise_set("x", [outcome(2)], [1]).metrics().keys()


def test_rewards_on_a_scale_below_one_are_remarked_once_in_a_run(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path), model={"path": "m"})
    state = TrainState.start(config)
    low, failing = replace(outcome(0), best=0.5), replace(outcome(0), best=math.nan, statuses={"crash": 4})
    result = summarise_set("x", [low, failing], [1])
    failures, remark = (result.count(Status.CRASH), 0), result.remark()
    assert summarise_set("x", [replace(low, best=0.0)], [1]).remark() == "" == state.note_evaluation(*failures, "")
    assert "x: the best reward is 0.5, but accuracy" in remark == state.note_evaluation(*failures, remark)
    assert state.note_evaluation(0, 0, remark) == ""
    assert summarise_set("x", [low, outcome(1)], [1]).remark() == ""
    counts = summarise(config, state, 0).counts
    assert counts["crashes in evaluations"] == 8 and "timeouts in evaluations" not in counts
    assert counts["rewards that were None"] == 0
