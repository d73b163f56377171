"""Two ranks of which one fails, is signalled, or finds a problem that the other cannot see."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from or1.dist.oom_peers import CAN_ANCHOR
from or1.run.checkpoint import committed_steps, load_checkpoint
from tests.helpers.ranks import exit_codes, or1_command, or1_ranks, started
from tests.helpers.small_run import arguments, lines


def output(log: Path, rank: int) -> str:
    return Path(f"{log}.{rank}").read_text()


def wait_for_step(run_dir: Path, step: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while step not in committed_steps(run_dir / "checkpoints"):
        assert time.monotonic() < deadline, f"no checkpoint of step {step} within {timeout} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of two ranks and six steps, with a checkpoint of each step."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    assert or1_ranks(2, arguments(run_dir), run_dir.with_name("log")) == [0, 0]
    return run_dir


@pytest.mark.timeout(200)
def test_f13_a_killed_rank_ends_the_run_and_is_named(tmp_path: Path) -> None:
    log, limit_s = tmp_path / "log", 5
    fault = "train.forward:rank1:step2:kill"
    with started(or1_command, 2, arguments(tmp_path / "run"), str(log), OR1_FAULT=fault) as ranks:
        ranks[1][0].join(150)
        assert ranks[1][0].exitcode == -signal.SIGKILL
        # heartbeat_timeout_s = 5, and what a loaded machine may take on top.
        codes = exit_codes(ranks, limit_s + 10)
    assert codes == [75, -signal.SIGKILL]
    text = output(log, 0)
    assert "rank 1 (step 2, phase 'train', " in text and "pending) has given no sign of life" in text
    assert "Stacks of this rank" in text and "train" in text
    assert committed_steps(tmp_path / "run" / "checkpoints") == [1]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_rank_that_hangs_ends_the_run_at_the_time_limit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = {"dist__timeout_s": 8, "dist__heartbeat_timeout_s": 4}
    variables = {"OR1_FAULT": "train.forward:rank1:step2:hang"}
    with started(or1_command, 2, arguments(tmp_path / "run", **settings), str(log), **variables) as ranks:
        codes = exit_codes(ranks, 150)
    assert 0 not in codes
    assert "rank 1 (step 2, phase 'train', " in output(log, 0)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_f10_an_infinity_on_one_rank_skips_on_both_and_repeats_stop(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    fault = "train.gradient:rank1:step3+:inf"
    codes = or1_ranks(2, arguments(run_dir, optim__max_nonfinite_steps=2), log, OR1_FAULT=fault)
    # A rank may hear of the other's end before it comes to the same one.
    assert codes[0] == 70 and codes[1] in (70, 75)
    assert "2 updates in a row had a non-finite loss or gradient" in output(log, 0)
    before, after = (load_checkpoint(run_dir / "checkpoints" / f"step_{n}") for n in (2, 3))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(t.equal(after.tensors[name]) for name, t in before.tensors.items())
    assert after.state["totals"]["skipped_updates"] == 1 and after.state["updates"] == before.state["updates"] == 2
    assert [line["optim/skipped"] for line in lines(run_dir)[1:]] == [0, 0, 1]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_f14_sigterm_to_one_rank_finishes_the_step_and_commits_on_both(two_ranks: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = {"checkpoint__every_steps": 100}
    fault = "train.forward:rank1:step2:term"
    assert or1_ranks(2, arguments(run_dir, **settings), log, OR1_FAULT=fault) == [0, 0]
    assert committed_steps(run_dir / "checkpoints") == [2]
    assert "stopped after step 2" in output(log, 0) and "after the current step is committed" in output(log, 1)
    assert or1_ranks(2, arguments(run_dir, **settings), log) == [0, 0]
    ours, theirs = (load_checkpoint(d / "checkpoints" / "step_6") for d in (run_dir, two_ranks))
    assert ours.state == theirs.state
    assert all(t.equal(theirs.tensors[name]) for name, t in ours.tensors.items())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_f14_sigterm_to_one_rank_in_a_rollout_keeps_what_is_finished_on_both(two_ranks: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = {"checkpoint__every_steps": 100, "rollout__batch_size": 1}
    fault = "rollout.token:rank1:step2:term"
    assert or1_ranks(2, arguments(run_dir, **settings), log, OR1_FAULT=fault) == [0, 0]
    assert committed_steps(run_dir / "checkpoints") == [1]
    assert "stopped in the rollout of step 2" in output(log, 0) and "stopped after step 1" in output(log, 0)
    groups = load_checkpoint(run_dir / "checkpoints" / "step_1").state["in_flight"]["groups"]
    scored = [member[3] is not None for _, members, _ in groups for member in members]
    assert len(scored) == 16 and any(scored) and not all(scored), "rank 0 finished its part, rank 1 did not"
    assert or1_ranks(2, arguments(run_dir, **settings), log) == [0, 0]
    for a, b in zip(lines(run_dir), lines(two_ranks), strict=True):
        assert a.get("optim/loss", 0.0) == pytest.approx(b.get("optim/loss", 0.0), rel=1e-4, abs=1e-7)


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_f14_a_second_sigterm_ends_at_once_and_the_last_commit_stands(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    fault = "train.forward:rank0:step2:hang"
    with started(or1_command, 1, arguments(run_dir), str(log), OR1_FAULT=fault) as ranks:
        # Not in the rollout, which a SIGTERM ends.
        deadline = time.monotonic() + 60
        while not (run_dir / "rollouts" / "step_2.parquet").is_file():
            assert time.monotonic() < deadline, "step 2 has no rollout within 60 s"
            time.sleep(0.02)
        process = ranks[0][0]
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(1)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGTERM)
        assert exit_codes(ranks, 5) == [128 + signal.SIGTERM]
    assert load_checkpoint(run_dir / "checkpoints" / "step_1").step == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("size", [1, 4])
def test_f08_a_run_of_two_ranks_goes_on_with_one_and_with_four(size: int, two_ranks: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_ranks / "checkpoints" / "step_3", run_dir / "checkpoints" / "step_3")
    shutil.copy(two_ranks / "metrics.jsonl", run_dir)
    assert or1_ranks(size, arguments(run_dir), tmp_path / "log", timeout=300) == [0] * size
    assert "resumed after step 3" in output(tmp_path / "log", 0)
    ours, theirs = lines(run_dir), lines(two_ranks)
    assert [line["step"] for line in ours] == list(range(7))
    for a, b in zip(ours[4:], theirs[4:], strict=True):
        for name in ("optim/loss", "optim/grad_norm", "policy/entropy", "reward/mean"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4, abs=1e-6), (a["step"], name)
    last = load_checkpoint(run_dir / "checkpoints" / "step_6")
    assert last.state["sampler"] == load_checkpoint(two_ranks / "checkpoints" / "step_6").state["sampler"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_f11_steps_without_any_mixed_group_change_nothing_on_either_rank(tmp_path: Path) -> None:
    data, run_dir = tmp_path / "wrong.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"question": f"{i}+1", "answer": "123456"}) + "\n" for i in range(8)))
    settings = {"stage__0__steps": 2, "stage__1__steps": 1, "data__train": data}
    assert or1_ranks(2, arguments(run_dir, **settings), tmp_path / "log") == [0, 0]
    first, last = (load_checkpoint(run_dir / "checkpoints" / f"step_{n}") for n in (1, 3))
    assert last.state["totals"]["empty_steps"] == 3 and last.state["updates"] == 0
    assert last.state["sampler"] != first.state["sampler"], "an empty step is a step"
    assert all(t.equal(last.tensors[name]) for name, t in first.tensors.items())
    for line in lines(run_dir)[1:]:
        assert line["group/kept"] == 0 and line["reward/mean"] == 0 and line["optim/updates"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not CAN_ANCHOR, reason="before torch 2.13 such a run ends, and resumes in shorter rows")
@pytest.mark.timeout(400)
def test_f25_a_rank_out_of_memory_halves_the_rows_of_both(two_ranks: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert or1_ranks(2, arguments(run_dir), log, OR1_FAULT="train.backward:rank1:step2:oom") == [0, 0]
    assert "out of memory with packed rows of 96 tokens; the update is retried with 48" in output(log, 0)
    assert "rank 1: out of memory (OR1_FAULT)" in output(log, 0)
    ours, theirs = lines(run_dir), lines(two_ranks)
    assert [line["optim/out_of_memory"] for line in ours[1:]] == [0, 1, 1, 1, 1, 1]
    assert [line["optim/row_tokens"] for line in ours[1:]] == [96, 48, 48, 48, 48, 48]
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        for name in ("optim/loss", "optim/grad_norm"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-5, abs=1e-7), (a["step"], name)
    assert load_checkpoint(run_dir / "checkpoints" / "step_6").state["budget"] == {"max_tokens": 48, "out_of_memory": 1}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_f25_a_failed_peer_ends_both_ranks_and_the_next_start_halves_rows(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = {"stage__0__steps": 2, "stage__1__steps": 1}
    with started(
        or1_command, 2, arguments(run_dir, **settings), str(log), OR1_FAULT="train.backward:rank1:step2+:oom"
    ) as ranks:
        ranks[1][0].join(150)
        codes = exit_codes(ranks, 15)
    assert codes == [75, 75]
    why = "a row of one token does not fit either" if CAN_ANCHOR else "FSDP2 cannot be reset after it before"
    for rank in (0, 1):
        assert "out of memory with packed rows of 96 tokens" in output(log, rank)
        assert "The same command resumes with rows of 48" in output(log, rank)
        assert f"rank 1: out of memory (OR1_FAULT); {why}" in output(log, rank)
    assert committed_steps(run_dir / "checkpoints") == [1]
    assert or1_ranks(2, arguments(run_dir, **settings), log) == [0, 0]
    assert "rows of 48 tokens, since those of 96 ran out of memory" in output(log, 0)
    assert [line["optim/row_tokens"] for line in lines(run_dir)[1:]] == [96, 48, 48]
