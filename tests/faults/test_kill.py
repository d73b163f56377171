"""SIGKILL at random points of a save, twenty times: every start resumes on a committed step, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from or1.run.checkpoint import committed_steps, load_checkpoint, verify_checkpoint
from tests.helpers.ranks import exit_codes, or1_command, or1_ranks, started
from tests.helpers.small_run import arguments, lines

KILLS = 20
SAME = ("reward/mean", "policy/entropy", "policy/entropy_coef", "optim/loss", "optim/grad_norm", "optim/lr")
# Short steps: what matters here is the saves.
QUICK = {
    "stage__0__steps": KILLS + 1,
    "stage__1__steps": 1,
    "stage__0__max_response_tokens": 14,
    "stage__1__max_response_tokens": 14,
}


def kill_in_save(run_dir: Path, log: Path, size: int, dice: random.Random) -> int:
    """Start the run, SIGKILL a random rank at a random point of its next save; returns that save's step."""
    folder = run_dir / "checkpoints"
    with started(or1_command, size, arguments(run_dir, **QUICK), str(log)) as ranks:
        deadline = time.monotonic() + 100
        while not (partials := list(folder.glob(".step_*.partial"))):
            assert all(process.is_alive() for process, _ in ranks), log.with_name(log.name + ".0").read_text()[-2000:]
            assert time.monotonic() < deadline, "no save began within 100 s"
        step = int(partials[0].name.split("_")[1].split(".")[0])
        # A save of this model takes 20 to 200 ms; some kills come just after the commit.
        time.sleep(dice.uniform(0, 0.15))
        victim = dice.randrange(size)
        os.kill(ranks[victim][0].pid, signal.SIGKILL)
        # The others are killed as a launcher would, before they could do another step.
        for process, _ in ranks:
            process.kill()
        exit_codes(ranks, 20)
    return step


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_f01_f07_twenty_kills_inside_saves_lose_nothing(tmp_path: Path) -> None:
    size = 2
    straight, killed, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    assert or1_ranks(size, arguments(straight, **QUICK), log, timeout=400) == [0] * size
    dice, in_save = random.Random(1), 0
    for _ in range(KILLS):
        before = committed_steps(killed / "checkpoints")
        step = kill_in_save(killed, log, size, dice)
        after = committed_steps(killed / "checkpoints")
        in_save += step not in after
        assert set(before) <= set(after), "a committed step is gone"
        assert all(verify_checkpoint(killed / "checkpoints" / f"step_{s}") for s in after)
    assert or1_ranks(size, arguments(killed, **QUICK), log, timeout=400) == [0] * size
    print(f"{KILLS} kills, {in_save} of them before the commit")
    assert in_save >= KILLS // 4, "too few kills hit a save before its commit to show anything"
    assert not list((killed / "checkpoints").glob(".step_*"))

    ours, theirs = lines(straight), lines(killed)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(KILLS + 3))
    for a, b in zip(ours, theirs, strict=True):
        assert {k: a.get(k) for k in SAME} == {k: b.get(k) for k in SAME}, f"step {a['step']}"
    for step in range(1, KILLS + 3):
        tables = [pq.read_table(run / "rollouts" / f"step_{step}.parquet") for run in (straight, killed)]
        assert tables[0].equals(tables[1]), f"samples of step {step}"
    last = [load_checkpoint(run / "checkpoints" / f"step_{KILLS + 2}") for run in (straight, killed)]
    assert last[0].state == last[1].state
    assert all(t.equal(last[1].tensors[name]) for name, t in last[0].tensors.items())
