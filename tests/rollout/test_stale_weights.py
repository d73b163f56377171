"""Runs whose engine keeps old weights or an old prefix cache: the first check of log-probs stops them."""

from __future__ import annotations

import copy
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from or1.cli import main
from or1.config import Config
from or1.rollout.engine import Engine
from or1.rollout.hf import HfEngine
from or1.train import build

# Nothing that can be learnt, so that every step has something to learn from.
REWARD = """
from zlib import crc32

def noise(completions, **columns):
    return [crc32(text.encode()) % 8 / 8 for text in completions]
"""


@pytest.fixture
def arguments(root: Path, tmp_path: Path) -> list[str]:
    """`or1` arguments of three steps that change the weights much, on prompts of several cache blocks."""
    dice = random.Random(1)
    problems = ({"question": "+".join(str(dice.randrange(1000)) for _ in range(20)), "answer": "0"} for _ in range(8))
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    (tmp_path / "reward.py").write_text(REWARD)
    stage = {"steps": 3, "max_response_tokens": 16, "prompts_per_step": 4, "group_size": 4}
    settings = {
        "run_dir": tmp_path / "run",
        "model.path": root / "examples/tiny-adder",
        "data.train": tmp_path / "sums.jsonl",
        "data.max_prompt_tokens": 100,
        "reward.kind": f"{tmp_path}/reward.py:noise",
        "reward.workers": 1,
        "reward.require_think_close": "false",
        "rollout.verify_every": 1,
        "optim.lr": 3e-3,
        "optim.warmup_steps": 0,
        "eval.sets": "[]",
        "log.tensorboard": "false",
        "stage": json.dumps([stage]).replace(":", "="),
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["train", str(root / "examples/quickstart.toml"), *overrides]


def drifts(tmp_path: Path) -> list[float]:
    """Return the largest difference that the check after each step found."""
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["mismatch/check_max"] for line in lines if line["step"]]


class Copied:
    """transformers' generate on a copy of the weights, which pushes reach while `pushes` lasts."""

    shares_weights, continuous_batching = False, False

    def __init__(self, engine: HfEngine, pushes: int):
        self.trained, self.pushes = engine.model, pushes
        self.engine = HfEngine(copy.deepcopy(engine.model), engine.tokenizer, engine.batch_size)
        self.generate, self.release, self.close = self.engine.generate, self.engine.release, self.engine.close

    @property
    def version(self) -> int:
        return self.engine.version

    def update_weights(self, version: int) -> None:
        if self.pushes > 0:
            self.engine.model.load_state_dict(self.trained.state_dict())
        self.pushes -= 1
        self.engine.update_weights(version)


@pytest.mark.parametrize("pushes", [0, 1, 3])
def test_f18_a_copy_that_no_push_reaches_any_more_stops_the_run_at_once(
    pushes: int,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_engine = build.make_engine

    def make_copied(config: Config, *rest: object) -> Engine:
        return Copied(make_engine(config, *rest), pushes)

    monkeypatch.setattr(build, "make_engine", make_copied)
    code = main([*arguments, "--set", "rollout.engine=hf"])
    assert len(drifts(tmp_path)) == pushes and max(drifts(tmp_path), default=0.0) < 1e-4
    assert code == (0 if pushes == 3 else 70)
    if code:
        assert f"disagree after the push of version {pushes + 1}" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["push.cache", "push.weights"])
def test_f18_vllm_with_a_stale_cache_or_old_weights_stops_the_run_at_once(
    fault: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    or1: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("OR1_FAULT", f"{fault}:rank0:step2:skip")
    done = or1(*arguments, "--set", "rollout.engine=vllm", timeout=350)
    assert done.returncode == 70, done.stderr
    assert "engine and trainer disagree after the push of version 2" in done.stderr
    assert len(drifts(tmp_path)) == 1 and drifts(tmp_path)[0] < 1e-4
