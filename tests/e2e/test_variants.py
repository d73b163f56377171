"""A run with every element of MAGIC that is off by default, killed halfway and resumed, ends as one that was not."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from or1.run.checkpoint import committed_steps
from tests.helpers.ranks import start_or1

SETTINGS = (
    "stage.0.steps=9",
    "stage.1.steps=2",
    "stage.0.prompts_per_step=8",
    "stage.1.prompts_per_step=8",
    "stage.0.group_size=8",
    "stage.1.group_size=8",
    "stage.0.minibatch_prompts=4",
    "stage.0.reuse=2",
    "stage.0.until=plateau",
    "stage.0.plateau_evals=2",
    "stage.0.plateau_gain=9",
    "stage.0.max_response_tokens=24",
    "loss.kl_coef=0.01",
    "loss.normaliser=sequence",
    "loss.denominator=sampled",
    "loss.advantage_mask=after",
    "loss.refill_rounds=1",
    "reward.overlong_buffer=8",
    "eval.every_steps=1",
    "eval.sets.0.limit=16",
    "eval.sets.1.limit=4",
    "checkpoint.every_steps=1",
    "checkpoint.keep=100",
    "log.tensorboard=false",
)
Run = Callable[..., subprocess.CompletedProcess[str]]


def train(or1: Run, run_dir: Path, *more: str) -> str:
    overrides = [part for o in (*SETTINGS, f"run_dir={run_dir}", *more) for part in ("--set", o)]
    done = or1("train", "examples/quickstart.toml", *overrides)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_after_step(root: Path, run_dir: Path, step: int) -> None:
    overrides = [part for o in (*SETTINGS, f"run_dir={run_dir}") for part in ("--set", o)]
    process = start_or1(["train", "examples/quickstart.toml", *overrides], root, run_dir.with_name("killed.log"))
    deadline = time.monotonic() + 400
    while step not in committed_steps(run_dir / "checkpoints"):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_variant_in_one_run_and_resumed(root: Path, quick_or1: Run, tmp_path: Path) -> None:
    out = train(quick_or1, tmp_path / "straight")
    records = lines(tmp_path / "straight")
    # Two windows of two evaluations, with the one at the start, cannot gain 9: the stage ends after three of nine.
    assert [r["stage"] for r in records] == [0, 0, 0, 0, 1, 1]
    assert "stage 1 ends with step 3: over 2 evaluations accuracy" in out and "Run finished: 5 of 5 steps" in out
    assert records[1]["optim/updates"] in (2, 4), "parts of at most four prompts, each trained twice"
    assert records[4]["optim/updates"] == 1
    assert records[2]["policy/ratio_mean"] != 1 and records[1]["optim/loss"] != 0

    first = pq.read_table(tmp_path / "straight" / "rollouts" / "step_1.parquet").to_pylist()
    cut = [row for row in first if row["finish"] == "length"]
    assert cut and all(row["advantage"] in (0, None) for row in cut), "masked after the group's statistics"
    groups = len({row["prompt_id"] for row in first})
    rejected = len({row["prompt_id"] for row in first if not row["kept"]})
    assert groups > 8 and rejected >= groups - 8, "rejected groups were replaced once"

    killed = tmp_path / "killed"
    kill_after_step(root, killed, 2)
    assert max(committed_steps(killed / "checkpoints")) < 4
    train(quick_or1, killed)
    same = ("stage", "reward/mean", "policy/entropy", "optim/loss", "optim/grad_norm", "completion/len_mean")
    assert [r["step"] for r in records] == [r["step"] for r in lines(killed)]
    for ours, theirs in zip(records, lines(killed), strict=True):
        for key in same:
            assert ours.get(key) == theirs.get(key), (ours["step"], key)
