"""200 SIGKILLs at random times to every kind of process of a run: what resumes ends as a run that nobody killed.

The seed is printed; KILL_SEED repeats one. KILL_COUNT says how many kills there are in all.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from or1.run.checkpoint import committed_steps, load_checkpoint, verify_checkpoint
from tests.helpers.ranks import exit_codes, or1_command, start_or1, started
from tests.helpers.small_run import ROOT, arguments, lines

SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
KILLS = int(os.environ.get("KILL_COUNT", "200"))
SHARES = {"trainer": 0.35, "one rank": 0.2, "all ranks": 0.2, "launcher": 0.1, "worker": 0.15}
STEPS = 12
SETTINGS = {
    "stage__0__steps": STEPS - 2,
    "stage__1__steps": 2,
    "stage__0__max_response_tokens": 16,
    "stage__1__max_response_tokens": 20,
    "reward__workers": 2,
}
EARLY = 0.25
"""Share of kills at a time that knows nothing of the run, mostly while it starts."""


def children(pid: int) -> list[int]:
    """Return all descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            own = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += own + [each for child in own for each in children(child)]
    return found


def gone(pids: list[int]) -> bool:
    """Return True if none of the processes runs; a zombie does not run."""
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                return False
        except OSError:
            continue
    return True


@contextmanager
def all_end(pids: list[int], limit_s: float = 15) -> Iterator[None]:
    """Check that the descendants of a killed process end soon after it."""
    yield
    deadline = time.monotonic() + limit_s
    while not gone(pids):
        assert time.monotonic() < deadline, f"some of {pids} outlive the kill"
        time.sleep(0.05)


def await_moment(run_dir: Path, dice: random.Random, over: Callable[[], bool]) -> bool:
    """Wait for a random moment, most often one to three steps from here; returns False if the run ends first."""
    if dice.random() < EARLY:
        deadline, wanted = time.monotonic() + dice.uniform(0.2, 5.0), None
    else:
        deadline, wanted = time.monotonic() + 300, step_of(run_dir) + dice.randint(1, 3)
    while time.monotonic() < deadline and not over():
        if wanted is not None and step_of(run_dir) >= wanted:
            time.sleep(dice.uniform(0, 0.3))
            break
        time.sleep(0.01)
    return not over()


def step_of(run_dir: Path) -> int:
    """Return the number of lines in metrics.jsonl, which grows with the run."""
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


Attempt = Callable[[Path, Path, random.Random], tuple[bool, int]]
"""Starts a run and kills; returns whether the run is finished and how many kills there were."""


def kill_trainer(run_dir: Path, log: Path, dice: random.Random) -> tuple[bool, int]:
    process = start_or1(arguments(run_dir, **SETTINGS), ROOT, log)
    if not await_moment(run_dir, dice, lambda: process.exitcode is not None):
        return finished(process.exitcode, log)
    with all_end(children(process.pid)):
        process.kill()
        process.join()
    return False, 1


def kill_worker(run_dir: Path, log: Path, dice: random.Random) -> tuple[bool, int]:
    process, kills = start_or1(arguments(run_dir, **SETTINGS), ROOT, log), 0
    while True:
        if not await_moment(run_dir, dice, lambda: process.exitcode is not None):
            return finished(process.exitcode, log)[0], kills
        workers = [pid for pid in children(process.pid) if "or1.reward.worker" in command_of(pid)]
        if workers:
            os.kill(dice.choice(workers), signal.SIGKILL)
            kills += 1


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def kill_ranks(how_many: int, run_dir: Path, log: Path, dice: random.Random) -> tuple[bool, int]:
    with started(or1_command, 2, arguments(run_dir, **SETTINGS), str(log)) as ranks:
        processes = [process for process, _ in ranks]
        await_moment(run_dir, dice, lambda: all(process.exitcode is not None for process in processes))
        victims = [p for p in dice.sample(processes, how_many) if p.exitcode is None]
        for process in victims:
            process.kill()
        # A rank that is left alone ends by itself, with 75.
        codes = exit_codes(ranks, 60)
    assert set(codes) <= {0, 75, -signal.SIGKILL}, log.with_name(log.name + ".0").read_text()[-3000:]
    return codes == [0, 0], len(victims)


def kill_launcher(run_dir: Path, log: Path, dice: random.Random) -> tuple[bool, int]:
    command = [sys.executable, "-m", "or1", *arguments(run_dir, "--nproc", "2", **SETTINGS)]
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT) as process:
        if not await_moment(run_dir, dice, lambda: process.poll() is not None):
            return finished(process.wait(), log)
        with all_end(children(process.pid)):
            process.kill()
    return False, 1


def finished(code: int, log: Path) -> tuple[bool, int]:
    """Run a command undisturbed and check that it exits with 0."""
    said = "".join(path.read_text()[-3000:] for path in log.parent.glob(f"{log.name}*"))
    assert code == 0, f"exit code {code}\n{said}"
    return True, 0


ATTEMPTS: dict[str, tuple[int, Attempt]] = {
    "trainer": (1, kill_trainer),
    "worker": (1, kill_worker),
    "one rank": (2, lambda *a: kill_ranks(1, *a)),
    "all ranks": (2, lambda *a: kill_ranks(2, *a)),
    "launcher": (2, kill_launcher),
}


def kept(line: dict) -> dict:
    """Return a record without the values that depend on the clock and the machine."""
    return {key: value for key, value in line.items() if key != "time" and not key.startswith(("time/", "perf/"))}


def assert_same(straight: Path, killed: Path) -> None:
    """Compare metrics, samples, state and tensors bit for bit."""
    ours, theirs = lines(straight), lines(killed)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(STEPS + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert kept(one) == kept(other), f"step {one['step']}"
    for step in range(1, STEPS + 1):
        tables = [pq.read_table(run / "rollouts" / f"step_{step}.parquet") for run in (straight, killed)]
        assert tables[0].equals(tables[1]), f"samples of step {step}"
    last = [load_checkpoint(run / "checkpoints" / f"step_{STEPS}") for run in (straight, killed)]
    assert last[0].state == last[1].state
    assert all(tensor.equal(last[1].tensors[name]) for name, tensor in last[0].tensors.items())
    assert not list(killed.rglob("*.partial"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return undisturbed runs on one and on two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    for size in (1, 2):
        with started(or1_command, size, arguments(folder / str(size), **SETTINGS), str(folder / f"log{size}")) as ranks:
            assert exit_codes(ranks, 300) == [0] * size
    return {size: folder / str(size) for size in (1, 2)}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", SHARES)
def test_runs_that_are_killed_end_as_others(kind: str, straight: dict[int, Path], tmp_path: Path) -> None:
    dice = random.Random(f"{SEED} {kind}")
    wanted, kills, starts, runs = max(1, round(KILLS * SHARES[kind])), 0, 0, 0
    size, attempt = ATTEMPTS[kind]
    while kills < wanted:
        runs += 1
        run_dir, done = tmp_path / f"run{runs}", False
        while not done:
            starts += 1
            done, killed = attempt(run_dir, tmp_path / "log", dice)
            kills += killed
            steps = committed_steps(run_dir / "checkpoints")
            assert all(verify_checkpoint(run_dir / "checkpoints" / f"step_{step}") for step in steps[-2:])
        assert_same(straight[size], run_dir)
    print(f"seed {SEED}: {kind}: {kills} kills in {starts} starts of {runs} runs, all as a run that nobody killed")
