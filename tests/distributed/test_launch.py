"""`or1 train --nproc` and torchrun as a person starts them: signals, exit codes, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from or1.commands import restarts
from or1.dist.local_ranks import _pass_on
from or1.run.checkpoint import MANIFEST, committed_steps
from tests.helpers.ranks import free_port, or1_ranks
from tests.helpers.small_run import arguments, lines

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "or1")


def children(pid: int) -> list[int]:
    """Return the running processes that `pid` started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def ranks_of(pid: int) -> list[int]:
    """Return the children of a launcher that run or1."""
    return [c for c in children(pid) if b"or1" in Path(f"/proc/{c}/cmdline").read_bytes().split(b"\0")]


def wait_for_step(run_dir: Path, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 150
    while step not in committed_steps(run_dir / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_nproc_forwards_signals_and_exit_codes_and_torchrun_resumes(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = {"stage__0__steps": 30, "stage__1__steps": 1}
    command = [sys.executable, "-m", "or1", *arguments(run_dir, "--nproc", "2", **settings)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        wait_for_step(run_dir, process, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 0, log.read_text()
    stopped = max(committed_steps(run_dir / "checkpoints"))
    assert stopped < 31 and f"stopped after step {stopped}, which is committed" in log.read_text()

    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        wait_for_step(run_dir, process, stopped + 1)
        ranks = children(process.pid)
        assert len(ranks) >= 2
        os.kill(ranks[-1], signal.SIGKILL)
        assert process.wait(100) not in (0, 1), log.read_text()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a rank outlived the launcher"
        time.sleep(0.1)

    newest = max(committed_steps(run_dir / "checkpoints"))
    shorter = arguments(run_dir, **settings | {"stage__0__steps": newest + 1, "stage__1__steps": 1})
    command = [sys.executable, *TORCHRUN, *shorter]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(run_dir)] == list(range(newest + 3))


def test_a_signal_reaches_the_ranks_that_still_run_when_one_has_ended() -> None:
    with subprocess.Popen(["true"]) as ended, subprocess.Popen(["sleep", "60"]) as running:
        ended.wait()
        _pass_on(signal.SIGTERM, [ended.pid, running.pid])
        assert running.wait(10) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_dir_with_other_settings_is_refused_by_all_ranks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = {"stage__0__steps": 1, "stage__1__steps": 1}
    assert or1_ranks(2, arguments(tmp_path / "run", **settings), log) == [0, 0]
    codes = or1_ranks(2, arguments(tmp_path / "run", **settings, seed=7), log)
    assert codes[0] == 70 and codes[1] in (70, 75)
    assert "holds a run with other settings (seed)" in Path(f"{log}.0").read_text()


@pytest.mark.parametrize(
    ("codes", "new_step", "ends", "count"),
    [
        ([0], 0, 0, 1),
        ([2], 0, 2, 1),
        ([70], 0, 70, 1),
        ([129], 0, 129, 1),
        ([143], 0, 143, 1),
        ([75, 0], 0, 0, 2),
        ([137, 1, 75, 75], 0, 75, 3),
        # Each start leaves a new checkpoint, so the count of failures starts again.
        ([137, 137, 137, 137, 0], 1, 0, 5),
    ],
)
def test_restarts_are_for_what_may_pass_and_end_when_nothing_is_gained(
    codes: list[int], new_step: int, ends: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.001)
    again = restarts.Restarts(tmp_path, 2)
    starts = 0
    while True:
        starts += 1
        code = codes[starts - 1]
        if new_step:
            folder = tmp_path / f"step_{starts}"
            folder.mkdir()
            (folder / MANIFEST).write_text("{}")
        if not again.again(code):
            break
    assert (code, starts) == (ends, count)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_with_restarts_survives_sigkill_and_forwards_sigterm(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = {"stage__0__steps": 60, "stage__1__steps": 1}
    command = [sys.executable, "-m", "or1", *arguments(run_dir, "--restarts", "1", **settings)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        wait_for_step(run_dir, process, 1)
        os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
        while "ended with exit code 137; restart 1 of 1" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        newest = max(committed_steps(run_dir / "checkpoints"))
        wait_for_step(run_dir, process, newest + 1)
        second = subprocess.run([*command, "--fresh"], capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 70 and "a run that is at work" in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 0, log.read_text()
    text = log.read_text()
    stopped = max(committed_steps(run_dir / "checkpoints"))
    assert stopped < 61 and f"stopped after step {stopped}, which is committed" in text
    assert [line["step"] for line in lines(run_dir)] == list(range(stopped + 1))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_nodes_without_a_scheduler_are_one_torchrun_line_each(tmp_path: Path) -> None:
    """The lines of docs/long-runs.md, with two processes of this machine as the nodes; one is asked to stop."""
    run_dir, port = tmp_path / "run", free_port()
    settings = {"stage__0__steps": 300, "stage__1__steps": 1, "dist__shard_ranks": 1, "checkpoint__every_steps": 2}

    def node(rank: int) -> subprocess.Popen:
        line = f"--nnodes=2 --node-rank={rank} --nproc-per-node=1 --master-addr=127.0.0.1 --master-port={port}"
        command = [sys.executable, "-m", "torch.distributed.run", *line.split(), "--shutdown-timeout=100"]
        with (tmp_path / f"log {rank}").open("w") as file:
            return subprocess.Popen(
                [*command, "-m", "or1", *arguments(run_dir, **settings)], stdout=file, stderr=subprocess.STDOUT
            )

    nodes = [node(rank) for rank in range(2)]
    try:
        wait_for_step(run_dir, nodes[0], 2)
        for each in nodes:
            each.send_signal(signal.SIGTERM)
        for each in nodes:
            each.wait(100)
    finally:
        for each in nodes:
            each.kill()
    log = (tmp_path / "log 0").read_text()
    stopped = max(committed_steps(run_dir / "checkpoints"))
    assert f"stopped after step {stopped}, which is committed" in log, log
    assert [line["step"] for line in lines(run_dir)] == list(range(stopped + 1))
