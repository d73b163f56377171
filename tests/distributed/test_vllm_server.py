"""Two training ranks, one vLLM server: both generate with it, one pushes the sharded weights."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("vllm")

from or1.run.checkpoint import committed_steps
from tests.helpers.ranks import exit_codes, or1_command, or1_ranks, started
from tests.helpers.small_run import arguments, lines

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SETTINGS = {
    "stage__0__steps": 3,
    "stage__1__steps": 1,
    "rollout__engine": "vllm",
    "rollout__vllm__placement": "server",
    "dist__timeout_s": 300,
    "dist__heartbeat_timeout_s": 60,
}


@pytest.mark.timeout(500)
def test_f15_the_death_of_a_shared_server_ends_a_run_that_then_resumes(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    # So many responses that the rollout after the first step is not over before the server is dead.
    more = {"stage__0__prompts_per_step": 8, "stage__0__group_size": 32, "rollout__verify_every": 1}
    command = arguments(run_dir, **more, **SETTINGS)
    with started(or1_command, 2, command, str(log)) as ranks:
        deadline = time.monotonic() + 200
        while 1 not in committed_steps(run_dir / "checkpoints"):
            assert time.monotonic() < deadline and ranks[0][0].is_alive(), Path(f"{log}.0").read_text()[-3000:]
            time.sleep(0.05)
        os.kill(server_of(ranks[0][0].pid), signal.SIGKILL)
        codes = exit_codes(ranks, 60)
    assert codes == [75, 75]
    text = "".join(Path(f"{log}.{rank}").read_text() for rank in range(2))
    assert "responses were open. Run the same command: training resumes from the newest checkpoint" in text
    assert or1_ranks(2, command, log, timeout=200) == [0, 0], Path(f"{log}.0").read_text()[-3000:]
    assert "resumed after step 1" in Path(f"{log}.0").read_text()
    assert [line["step"] for line in lines(run_dir)] == list(range(5))
    assert all(line["mismatch/check_max"] < 1e-3 for line in lines(run_dir)[1:]), "every push arrived"
    for step, responses in ((1, 256), (2, 256), (3, 256), (4, 16)):
        rows = pq.read_table(run_dir / "rollouts" / f"step_{step}.parquet").to_pylist()
        assert len(rows) == responses and {row["version"] for row in rows} == {step - 1}


@pytest.mark.nightly
@pytest.mark.timeout(500)
def test_a_shared_server_takes_weights_while_two_ranks_generate(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    ahead = {"rollout__max_staleness": 2, "loss__is_cap": 2.0, "rollout__verify_every": 1, "stage__0__steps": 5}
    command = arguments(run_dir, **SETTINGS | ahead)
    assert or1_ranks(2, command, log, timeout=300) == [0, 0], Path(f"{log}.0").read_text()[-3000:]
    records = lines(run_dir)[1:]
    assert [line["step"] for line in records] == list(range(1, 7))
    assert all(line["mismatch/check_max"] < 1e-3 for line in records), "every push arrived"
    found = [line["policy/staleness_max"] for line in records]
    # When a push meets a response is a matter of time, the bound is not. The last step is the first of its stage.
    assert all(age <= most for age, most in zip(found, [0, 1, 2, 2, 2, 0], strict=True)) and max(found) > 0
    for number in range(1, 7):
        rows = pq.read_table(run_dir / "rollouts" / f"step_{number}.parquet").to_pylist()
        assert len(rows) == 16 and all(row["token_ids"] for row in rows)


def server_of(trainer: int) -> int:
    """Process id of the vLLM server that a trainer started."""
    children = ["ps", "-o", "pid=,args=", "--ppid", str(trainer)]
    rows = subprocess.run(children, capture_output=True, text=True, check=True).stdout.splitlines()
    return next(int(row.split()[0]) for row in rows if "or1.rollout.vllm.process" in row)
