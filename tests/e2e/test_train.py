"""`or1 train` as a person runs it: resume after SIGKILL, bad data, dry run, report, export."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from or1.cli import main
from or1.run.checkpoint import committed_steps, load_checkpoint
from tests.helpers.public_api import OUT_OF_DATE, committed, run_directory
from tests.helpers.ranks import start_or1

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = (
    "stage.0.steps=6",
    "stage.1.steps=4",
    "stage.0.prompts_per_step=8",
    "stage.1.prompts_per_step=8",
    "stage.0.group_size=8",
    "stage.1.group_size=8",
    "eval.sets.0.limit=16",
    "eval.sets.1.limit=4",
    "checkpoint.every_steps=1",
    "checkpoint.keep=100",
    "eval.every_steps=4",
    "log.tensorboard=false",
)
SAME = (
    "reward/mean",
    "policy/entropy",
    "policy/entropy_coef",
    "policy/entropy_controller",
    "optim/loss",
    "optim/grad_norm",
    "optim/lr",
    "completion/len_mean",
    "eval/greedy/avg@1",
    "eval/sampled/avg@4",
)


def arguments(run_dir: Path, *more: str) -> list[str]:
    overrides = (*SMALL, f"run_dir={run_dir}", *more)
    return ["train", "examples/quickstart.toml", *(part for o in overrides for part in ("--set", o))]


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def kill_after_step(root: Path, run_dir: Path, step: int, *more: str) -> None:
    """Start a run and SIGKILL it once the checkpoint of `step` stands."""
    log = run_dir.with_name("killed.log")
    process = start_or1(arguments(run_dir, *more), root, log)
    deadline = time.monotonic() + 400
    while step not in committed_steps(run_dir / "checkpoints"):
        assert process.is_alive(), f"ended early:\n{Path(f'{log}.err').read_text()}"
        assert time.monotonic() < deadline, f"no checkpoint of step {step} within 400 s"
        time.sleep(0.02)
    process.kill()
    process.join()


VARIANTS = {
    "on-policy": (),
    "two updates a rollout": ("stage.0.minibatch_prompts=4", "stage.1.minibatch_prompts=4"),
    "a mixture without what was solved": (
        "data.train=[]",
        'data.mix=[{path="examples/tiny-adder/train.jsonl", weight=2}, {path="examples/tiny-adder/heldout.jsonl"}]',
        "data.drop_solved=true",
        "stage.0.group_size=2",
    ),
    "partial rollouts": ("rollout.partial_tokens=16", "loss.is_cap=2.0"),
    "entropy bonus": ('loss.entropy.variant="paper"', "loss.entropy.target=9", "loss.entropy.coef=0.01"),
}


MARKS = {"entropy bonus": pytest.mark.slow}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, pytest.mark.nightly)) for n in VARIANTS])
def test_ten_steps_equal_five_killed_and_five_resumed(name: str, root: Path, quick_or1: Run, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = quick_or1(*arguments(straight, *VARIANTS[name]))
    assert done.returncode == 0, done.stderr
    kill_after_step(root, killed, 5, *VARIANTS[name])
    assert max(committed_steps(killed / "checkpoints")) < 10
    resumed = quick_or1(*arguments(killed, *VARIANTS[name]))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step" in resumed.stdout

    ours, theirs = lines(straight), lines(killed)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(11))
    for a, b in zip(ours, theirs, strict=True):
        assert {k: a.get(k) for k in SAME} == {k: b.get(k) for k in SAME}, f"step {a['step']}"
    if name == "entropy bonus":
        assert any(line.get("policy/entropy_coef", 0) > 0 for line in ours)
    if name == "a mixture without what was solved":
        assert [line.get("data/dropped_solved", 0) > 0 for line in ours] == [False] * 7 + [True] * 4
    for step in range(1, 11):
        tables = [pq.read_table(run / "rollouts" / f"step_{step}.parquet") for run in (straight, killed)]
        assert tables[0].equals(tables[1]), f"samples of step {step}"
    last = [load_checkpoint(run / "checkpoints" / "step_10") for run in (straight, killed)]
    assert last[0].state == last[1].state
    assert last[0].tensors.keys() == last[1].tensors.keys()
    assert all(t.equal(last[1].tensors[name]) for name, t in last[0].tensors.items())
    weights = [(run / "weights" / "step_10" / "model.safetensors").read_bytes() for run in (straight, killed)]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def finished(quick_or1: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run of three steps."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    settings = ("stage.0.steps=2", "stage.1.steps=1", "log.tensorboard=true")
    done = quick_or1(*arguments(run_dir, *settings))
    assert done.returncode == 0, done.stderr
    (run_dir.parent / "stdout.txt").write_text(done.stdout)
    return run_dir


def test_a_run_leaves_the_files_that_it_promises(finished: Path) -> None:
    assert run_directory(finished) == committed()[1], OUT_OF_DATE
    out = (finished.parent / "stdout.txt").read_text()
    assert "greedy avg@1" in out and "->" in out and str(finished) in out
    for key in ("reward/mean", "policy/entropy", "mismatch/kl", "optim/grad_norm", "time/rollout", "perf/tokens_per_s"):
        assert key in lines(finished)[1], key


def test_rollouts_hold_the_advantages_of_the_equation(finished: Path) -> None:
    rows = pq.read_table(finished / "rollouts" / "step_1.parquet").to_pylist()
    assert len(rows) == 64
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
        assert len(row["token_ids"]) == len(row["logp"]) and (row["reward"] == 1.0) == (row["status"] == "ok")
        assert row["finish"] != "length" or (row["reward"] == 0 and row["status"] == "truncated")
    assert any(row["kept"] for row in rows)
    for group in by_prompt.values():
        rewards = [row["reward"] for row in group]
        mixed = len(set(rewards)) > 1
        assert all(row["kept"] == mixed and (row["advantage"] is not None) == mixed for row in group)
        if mixed:
            mean = sum(rewards) / 8
            std = (sum((r - mean) ** 2 for r in rewards) / 7) ** 0.5
            assert [row["advantage"] for row in group] == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards])


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(finished: Path, quick_or1: Run) -> None:
    before = lines(finished)
    done = quick_or1(*arguments(finished, "stage.0.steps=2", "stage.1.steps=1", "log.tensorboard=true"))
    assert done.returncode == 0, done.stderr
    assert lines(finished) == before and "resumed after step 3" in done.stdout


def test_other_settings_in_the_same_folder_are_refused(finished: Path, quick_or1: Run) -> None:
    done = quick_or1(*arguments(finished, "optim.lr=1e-3", "seed=5"))
    assert done.returncode == 70
    assert "optim.lr, seed" in done.stderr and "--fresh" in done.stderr and "Traceback" not in done.stderr


def test_report_and_export_of_a_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").stat().st_size > 20_000
    assert main(["export", str(finished), "--out", str(tmp_path / "hf")]) == 0
    exported, final = (d / "model.safetensors" for d in (tmp_path / "hf", finished / "weights" / "step_3"))
    assert exported.read_bytes() == final.read_bytes()
    assert main(["export", str(finished), "--step", "77"]) == 70
    assert "no checkpoint of step 77; it has [1, 2, 3]" in capsys.readouterr().err


@pytest.mark.slow
def test_replay_repeats_a_step_bit_for_bit_and_writes_nothing(finished: Path, quick_or1: Run) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    done = quick_or1("replay", str(finished), "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same bits") >= 12 and "differs" not in done.stdout
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    refused = quick_or1("replay", str(finished), "9")
    assert refused.returncode == 70 and "past the last of 3 steps" in refused.stderr


def test_dry_run_shows_the_plan_and_makes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    assert main([*arguments(tmp_path / "run"), "--dry-run"]) == 0
    assert "10 steps in 2 stages" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_rows_are_named_and_too_many_stop_the_run(tmp_path: Path, quick_or1: Run) -> None:
    data = tmp_path / "train.jsonl"
    good = [json.dumps({"question": f"{i}+1", "answer": str(i + 1)}).encode() for i in range(20)]
    bad = [
        b'{"question": "1+1", "ans',
        b'{"question": "\xff", "answer": "2"}',
        b'{"question": "1+1"}',
        b'{"question": "", "answer": "2"}',
    ]
    data.write_bytes(b"\n".join(good[:10] + bad + good[10:]) + b"\n")
    run = ["stage.0.steps=1", "stage.1.steps=1", "eval.sets=[]", f"data.train={data}"]
    stopped = quick_or1(*arguments(tmp_path / "a", *run))
    assert stopped.returncode == 65 and "Traceback" not in stopped.stderr
    for number in (11, 12, 13, 14):
        assert f"train.jsonl:{number}: " in stopped.stderr
    allowed = quick_or1(*arguments(tmp_path / "b", *run, "data.max_bad_fraction=0.2"))
    assert allowed.returncode == 0, allowed.stderr
    assert "20 kept" in allowed.stdout and "4 bad" in allowed.stdout
    for number in (11, 12, 13, 14):
        assert f"train.jsonl:{number}: " in allowed.stdout
