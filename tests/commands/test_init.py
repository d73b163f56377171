"""`or1 init`: the folder that it writes can be trained, and its config is sized by the plan."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from or1.commands import init
from or1.commands.arguments import Parser
from or1.config.load import load_config
from or1.core.errors import RunError


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser()
    init.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_default_is_a_task_of_your_own_that_trains_here(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init.run(parsed("mine")) == 0
    assert "Next: or1 train mine/config.toml --dry-run" in capsys.readouterr().out
    config = load_config("mine/config.toml")
    assert config.reward.kind == "mine/reward.py:reward" and config.model.path == "mine/tiny-adder"
    assert len(Path(config.data.train[0]).read_text().splitlines()) == 20
    from or1.data.problems import load_problems
    from or1.model.load import load_tokenizer

    assert len(load_problems(config, load_tokenizer(config.model.path)).prompts) == 20


def test_the_reward_is_a_function_that_can_be_edited(empty: Path) -> None:
    assert init.run(parsed("mine")) == 0
    spec = importlib.util.spec_from_file_location("mine_reward", "mine/reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.reward(["it is 12", "13", "none"], answer=["12", "12", "12"], other=[1, 2, 3]) == [1.0, 0.1, 0.0]


@pytest.mark.parametrize(
    ("gpu", "model", "longest"), [("H100", "Qwen/Qwen2.5-1.5B", 8192), ("A100-40G", "Qwen/Qwen2.5-0.5B", 8192)]
)
def test_sizes_come_from_the_plan(empty: Path, gpu: str, model: str, longest: int) -> None:
    from or1.plan.devices import find_device
    from or1.plan.estimate import make_plan
    from or1.plan.shapes import shape_of

    assert init.run(parsed("m", "--model", model, "--task", "math", "--gpu", gpu)) == 0
    config = load_config("m/config.toml")
    assert config.stage[0].max_response_tokens == longest and "\\boxed{}" in config.data.prompt_suffix
    assert config.rollout.engine == "vllm"
    plan = make_plan(config, shape_of(model), find_device(gpu, "auto")[0])
    assert plan.fits and config.optim.max_tokens_per_rank >= plan.longest


def test_code_rows_are_read(empty: Path) -> None:
    assert init.run(parsed("c", "--model", "Qwen/Qwen2.5-1.5B", "--task", "code", "--gpu", "H100")) == 0
    from or1.data import load_prompts

    prompts = load_prompts(["c/train.jsonl"], None, max_prompt_tokens=1024).prompts
    assert len(prompts) == 20 and prompts[0].tests is not None


@pytest.mark.slow
def test_what_does_not_fit_or_is_not_known_is_said(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init.run(parsed("big", "--model", "Qwen/Qwen2.5-32B", "--task", "math", "--gpu", "A100-40G")) == 0
    assert "Qwen/Qwen2.5-32B does not fit one A100-40G" in capsys.readouterr().out
    assert init.run(parsed("other", "--model", "some/model", "--task", "math", "--gpu", "H100")) == 0
    assert "sizes are a guess: no config.json for model.path = 'some/model'" in capsys.readouterr().out
    assert init.run(parsed("code", "--task", "code")) != 0
    (empty / "mine").mkdir()
    (empty / "mine" / "x").write_text("")
    with pytest.raises(RunError, match="mine is there already; name a new folder"):
        init.run(parsed("mine"))
