"""Steps in which something is missing: no complete group, no reward, no trainable token."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from or1.config import EvalSet, ModelConfig, OptimConfig
from or1.core.errors import ModelSourceError, OptimizerError, ScorerError
from or1.core.types import Score, Status
from or1.data.fingerprint import inputs_of
from or1.dist.watchdog import Watchdog
from or1.dist.world import SINGLE
from or1.eval.accuracy import evaluate_set
from or1.magic.selection import minibatches, select
from or1.model.load import ModelError, load_model, load_tokenizer
from or1.report.live import RunDisplay
from or1.report.rank_display import RankDisplay
from or1.reward import make_scorer
from or1.run.message_log import RunLog
from or1.run.metrics_log import read_metrics
from or1.run.state import TrainState
from or1.train.optim import MasterAdamW
from tests.helpers.hand_run import EOS, ONE, ZERO, config_of, group, learn, response, run_of, trainer_of


def test_an_evaluation_after_a_step_without_a_complete_group_counts(tmp_path: Path) -> None:
    """Partial rollouts may leave every group open, so that nothing is known of truncation."""
    trainer = trainer_of(config_of(tmp_path, [{"steps": 3, "until": "plateau"}]))
    trainer.state.stages.finish_step(1, {"eval/test/avg@1": 0.5})
    step, accuracy, truncated = trainer.state.stages.now.history[0]
    assert (step, accuracy) == (1, 0.5) and math.isnan(truncated)


def test_a_minibatch_without_rewards_is_left_out_and_the_others_train(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, [{"minibatch_prompts": 1}], loss={"reject_zero_advantage": False, "old_logp": "rollout"}
    )
    scored = group([1, 0], [response(ZERO, ONE, EOS), response(ZERO, EOS)], "a")
    unscored = group([math.nan, math.nan], [response(ZERO, EOS)] * 2, "b")
    assert learn(trainer_of(config), scored, unscored)["optim/updates"] == 1
    unknown = group([1, 0], [replace(response(ZERO, EOS), logp=np.full(2, np.nan, np.float32))] * 2, "c")
    chosen = select([scored, unknown], config.loss, config.reward, config.stage[0])
    assert len(minibatches(chosen, config.loss, config.stage[0])) == 1
    assert learn(trainer_of(config), unscored)["optim/updates"] == 0


def test_a_step_without_any_reward_of_an_own_function_stops_the_run(tmp_path: Path) -> None:
    failed = group([math.nan, math.nan], [response(ZERO, EOS)] * 2)
    failed = replace(failed, scores=(Score(math.nan, Status.CRASH, "why"),) * 2)
    trainer = trainer_of(config_of(tmp_path, reward={"kind": "module:function"}))
    with pytest.raises(ScorerError, match=r"none of the 4 responses of step 1 .* the last: why"):
        learn(trainer, failed, failed)


@pytest.mark.slow
def test_evaluations_in_a_run_take_the_ks_they_are_given(tmp_path: Path) -> None:
    trainer = trainer_of(config_of(tmp_path))
    settings = EvalSet(name="s", path="s", samples=4)
    with make_scorer(trainer.config.reward, trainer.parts.data.prompts) as scorer:
        result = evaluate_set(trainer.engine, scorer, trainer.parts.data.prompts, settings, 4, pass_k=(3,))
    assert sorted(result.pass_at) == [3]


def test_weights_without_masters_are_refused_where_shards_are_masters(tmp_path: Path) -> None:
    model = trainer_of(config_of(tmp_path)).policy.model
    with pytest.raises(OptimizerError, match='use "master"'):
        MasterAdamW(model, OptimConfig(weights="stochastic"), replace(SINGLE, size=2))


def test_a_finished_run_trains_on_where_it_is_given_more_steps(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    one = {"reward": {"workers": 1}}
    run_of(config_of(tmp_path, **one))
    assert run_of(config_of(tmp_path, [{"steps": 2}], **one)).state.step == 2
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.slow
def test_a_resumed_trainer_gives_the_former_records_to_the_display(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    sections = {"reward": {"workers": 1}}
    run_of(config_of(tmp_path, **sections))
    former = read_metrics(tmp_path / "run" / "metrics.jsonl")
    console = Console(file=io.StringIO(), width=200)
    config = config_of(tmp_path, [{"steps": 2}], **sections)
    with RunDisplay(config.total_steps, config.stage, console) as shown:
        # What a run wrote after its newest checkpoint belongs to the steps that are done again.
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 9, "stage": 0, "reward/mean": 77.0}) + "\n")
        log = RunLog(tmp_path / "run")
        run_of(config, RankDisplay(Watchdog(SINGLE, 60.0), shown, log))
    means = [record["reward/mean"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert list(shown._history["reward/mean"]) == means and len(means) == 2 and means[0] == former[1]["reward/mean"]
    assert " start: resumed after step 1\n" in (tmp_path / "run" / "log.txt").read_text()


def test_a_model_that_cannot_be_read_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path, said in ((str(tmp_path), "holds no tokenizer"), ("nobody/nothing", "is no folder here")):
        with pytest.raises(ModelSourceError, match=f"{path}' {said}"):
            load_tokenizer(path)
    shutil.copy(trainer_of(config_of(tmp_path)).config.model.path + "/config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(ModelConfig(path=str(tmp_path), device="cpu"))


def test_a_resumed_run_says_which_of_its_inputs_have_changed(tmp_path: Path) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def score(completion):\n    return 1.0\n")
    config = config_of(tmp_path, reward={"kind": f"{reward}:score"})

    def resume(state: TrainState) -> list[str]:
        again = TrainState.start(config)
        again.load_state(json.loads(json.dumps(state.state_dict())))
        found = inputs_of(config, trainer_of(config).parts.data)
        said = again.note_inputs(found)
        assert again.totals["changed_inputs"] == len(said) and again.note_inputs(found) == []
        return said

    state = trainer_of(config).state
    assert resume(state) == []
    reward.write_text("def score(completion):\n    return 0.5\n")
    assert resume(state)[0].startswith(f"the reward function in {reward} changed since step 0")
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text().replace("1+3", "1+4"))
    assert len(said := resume(state)) == 2 and said[0].startswith("the training problems changed")
