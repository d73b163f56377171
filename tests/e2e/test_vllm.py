"""`or1 train` and `or1 doctor` with vLLM: the same gain, and resume while rollouts are made ahead."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("vllm")

from or1.run.checkpoint import committed_steps, load_checkpoint

from .test_train import SAME, arguments, kill_after_step, lines

pytestmark = pytest.mark.vllm

AHEAD = (
    'rollout.engine="vllm"',
    "rollout.overlap=true",
    "rollout.partial_tokens=16",
    "loss.is_cap=2.0",
    "rollout.verify_every=3",
    "stage.0.steps=2",
    "stage.1.steps=4",
    "eval.every_steps=3",
)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("steps", [(10, 15), pytest.param((30, 50), marks=pytest.mark.nightly)])
def test_quickstart_gains_as_with_the_embedded_engine(
    steps: tuple[int, int], tmp_path: Path, or1: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run_dir = tmp_path / "run"
    stages = (f"stage.{i}.steps={count}" for i, count in enumerate(steps))
    settings = ('rollout.engine="vllm"', f"run_dir={run_dir}", *stages)
    done = or1("train", "examples/quickstart.toml", *(x for s in settings for x in ("--set", s)), timeout=1400)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    accuracy = [r["eval/greedy/avg@1"] for r in records if "eval/greedy/avg@1" in r]
    print(f"{accuracy[0]:.1%} -> {accuracy[-1]:.1%} in {sum(r['time/step'] for r in records[1:]):.0f} s of steps")
    # What tests/e2e/test_quickstart.py asks of the embedded engine.
    assert accuracy[-1] - accuracy[0] >= 0.25
    checks = [r["mismatch/check_max"] for r in records if "mismatch/check_max" in r]
    assert len(checks) == sum(steps) // 10 and max(checks) < 1e-4
    # One optimizer step a rollout: the tokens are trained by the policy that sampled them.
    assert max(r["mismatch/kl"] for r in records if "mismatch/kl" in r) < 1e-8
    assert max(r["mismatch/ratio_max"] for r in records if "mismatch/ratio_max" in r) < 1 + 1e-4
    assert {r["policy/staleness"] for r in records[1:]} == {0.0}


@pytest.mark.nightly
@pytest.mark.timeout(500)
def test_resume_with_a_rollout_made_ahead_and_open_groups_repeats_the_run(
    root: Path, or1: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = or1(*arguments(straight, *AHEAD))
    assert done.returncode == 0, done.stderr
    kill_after_step(root, killed, 3, *AHEAD)
    at = load_checkpoint(killed / "checkpoints" / f"step_{max(committed_steps(killed / 'checkpoints'))}")
    assert at.step < 6 and at.state["in_flight"]["closed"] is not None and at.state["in_flight"]["groups"]
    resumed = or1(*arguments(killed, *AHEAD))
    assert resumed.returncode == 0 and "resumed after step" in resumed.stdout, resumed.stderr
    ours, theirs = lines(straight), lines(killed)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(7))
    for a, b in zip(ours, theirs, strict=True):
        for key in SAME:
            # While the engine generates beside the trainer its batches form by time, which moves the last bits.
            ours_, theirs_ = (line.get(key, float("nan")) for line in (a, b))
            assert ours_ == pytest.approx(theirs_, rel=1e-4, abs=1e-6, nan_ok=True), f"step {a['step']}: {key}"
    for step in range(1, 7):
        tables = [pq.read_table(run / "rollouts" / f"step_{step}.parquet") for run in (straight, killed)]
        assert tables[0]["token_ids"].equals(tables[1]["token_ids"]), f"samples of step {step}"
        assert tables[0]["version"].equals(tables[1]["version"]), f"versions of step {step}"
    # Rollouts made ahead are one policy old, and what is carried on is older. The first of a stage is not made ahead.
    staleness = [line["policy/staleness"] for line in ours[1:]]
    assert staleness[0] == 0 and max(staleness) > 1 and all(s >= 1 for s in (staleness[1], *staleness[3:]))
    assert any(line["group/open"] > 0 for line in ours[1:])


STALE = ('rollout.engine="vllm"', 'rollout.vllm.placement="server"', "rollout.max_staleness=2", "loss.is_cap=2.0")


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_quickstart_gains_with_rollouts_two_steps_ahead(
    tmp_path: Path, or1: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run_dir = tmp_path / "run"
    settings = (*STALE, f"run_dir={run_dir}", "stage.0.steps=10", "stage.1.steps=15")
    done = or1("train", "examples/quickstart.toml", *(x for s in settings for x in ("--set", s)), timeout=1400)
    assert done.returncode == 0, done.stderr
    records = lines(run_dir)
    accuracy = [r["eval/greedy/avg@1"] for r in records if "eval/greedy/avg@1" in r]
    staleness = [r["policy/staleness"] for r in records[1:]]
    print(f"{accuracy[0]:.1%} -> {accuracy[-1]:.1%}, mean staleness {sum(staleness) / len(staleness):.2f}")
    assert accuracy[-1] - accuracy[0] >= 0.15
    assert 1 <= max(r["policy/staleness_max"] for r in records[1:]) <= 2 and max(staleness) > 0
    # The first rollout of a stage waits for its stage.
    assert [records[n]["policy/staleness_max"] for n in (1, 11)] == [0, 0]
    checks = [r["mismatch/check_max"] for r in records if "mismatch/check_max" in r]
    assert len(checks) == 2 and max(checks) < 1e-4


@pytest.mark.nightly
@pytest.mark.timeout(700)
def test_a_run_killed_with_rollouts_in_the_making_loses_none_of_them(
    root: Path, or1: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    more = (*STALE, "stage.0.steps=2", "stage.1.steps=6", "eval.every_steps=3", "checkpoint.every_steps=2")
    kill_after_step(root, killed, 4, *more)
    saved = load_checkpoint(killed / "checkpoints" / f"step_{max(committed_steps(killed / 'checkpoints'))}")
    state = saved.state["in_flight"]
    assert [number - saved.step for number, *_ in state["begun"]] == [1, 2]
    resumed = or1(*arguments(killed, *more))
    assert resumed.returncode == 0 and "resumed after step" in resumed.stdout, resumed.stderr
    assert [line["step"] for line in lines(killed)] == list(range(9))
    assert all(line["policy/staleness_max"] <= 2 for line in lines(killed)[1:])
    # Every token of the checkpoint is in a rollout that it was made for, with its version.
    rows = [
        list(zip(row["token_ids"], row["versions"] or [row["version"]] * len(row["token_ids"]), strict=True))
        for step in (saved.step + 1, saved.step + 2)
        for row in pq.read_table(killed / "rollouts" / f"step_{step}.parquet").to_pylist()
    ]
    starts = {tuple(row[:length]) for row in rows for length in range(len(row) + 1)}
    ids, versions = (saved.tensors[f"rollout.{name}"].tolist() for name in ("token_ids", "versions"))
    tokens, at = list(zip(ids, versions, strict=True)), 0
    for _, members, _ in state["groups"]:
        for length, *_ in members:
            assert tuple(tokens[at : at + length]) in starts
            at += length
    assert at == len(tokens) > 0
    assert all(row == sorted(row, key=lambda token: token[1]) for row in rows), "versions only rise"


def test_doctor_runs_a_canary_without_an_update(or1: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = or1("doctor", "examples/quickstart.toml", "--set", 'rollout.engine="vllm"')
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok canary") == 2 and "LocalEngine after a push" in done.stdout
    assert done.stdout.rstrip().endswith("everything works")
