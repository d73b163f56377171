"""Two training ranks, one vLLM server: both generate with it, one pushes the sharded weights."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("vllm")

from rank_processes import or1_ranks
from small_run import arguments, lines

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.timeout(400)
def test_two_ranks_share_a_server_and_its_log_probs_follow_every_push(tmp_path: Path) -> None:
    settings = {"stage__0__steps": 3, "stage__1__steps": 1, "rollout__engine": "vllm",
                "rollout__vllm__placement": "server", "rollout__verify_every": 1, "dist__timeout_s": 300,
                "dist__heartbeat_timeout_s": 60}  # fmt: skip
    run_dir, log = tmp_path / "run", tmp_path / "log"
    codes = or1_ranks(2, arguments(run_dir, **settings), log, timeout=350)
    assert codes == [0, 0], Path(f"{log}.0").read_text()[-3000:]
    steps = lines(run_dir)[1:]
    assert len(steps) == 4 and all(line["mismatch/check_max"] < 1e-3 for line in steps)
    assert any(line["optim/updates"] for line in steps)
    for step in range(1, 5):
        rows = pq.read_table(run_dir / "rollouts" / f"step_{step}.parquet").to_pylist()
        assert len(rows) == 16 and {row["version"] for row in rows} == {step - 1}
