"""Tensor parallelism by the external launcher: torchrun's ranks are vLLM's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.vllm


@pytest.mark.timeout(400)
def test_two_ranks_share_a_model_and_keep_their_own_responses(
    root: Path, tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(checkpoint(True)), "dtype": "float32", "device": "cpu"},
        "data": {"train": ["made"], "max_prompt_tokens": 64},
        "rollout": {"engine": "vllm", "batch_size": 16, "vllm": {"tensor_parallel": 2}},
        "stage": [{"steps": 1, "max_response_tokens": 64, "prompts_per_step": 4, "group_size": 4}],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29573",
        "-m",
        "tests.helpers.tensor_parallel",
        str(tmp_path / "config.json"),
        str(tmp_path),
    ]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=390, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert results[0]["shared"] == results[1]["shared"] and [len(group) for group in results[0]["shared"]] == [4] * 5
    assert [result["share"] for result in results] == [10, 10]
    for rank, result in enumerate(results):
        every = [[p, s] for p in range(3 - rank) for s in range(4)]
        assert result["prompts"] == 3 - rank and result["slots"] == [every] * 3
        assert max(result["drift"]) < 1e-4
        # Rank 0's deadline is over at once, and it decides for both.
        assert len(result["late"]) == len(every) and "deadline" in result["late"]
