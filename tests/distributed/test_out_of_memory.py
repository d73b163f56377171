"""A rank that runs out of memory in a row: no other waits for it, and all start the update again in smaller rows."""

from __future__ import annotations

import numpy as np
import pytest

from or1.config import ModelConfig
from or1.dist.oom_peers import CAN_ANCHOR
from or1.train.rank_rows import longest_of
from tests.helpers import dist_work
from tests.helpers.ranks import run_ranks

# Which rank, and where: among a row's first collectives, in its midst, at its last; in a later row; on both ranks.
FAILURES = [
    ("score", {1: "layer 0 forward 1"}),
    ("score", {0: "head forward 2"}),
    ("update", {1: "layer 0 forward 1"}),
    ("update", {0: "layer 1 forward 2"}),
    ("update", {1: "head forward 1"}),
    ("update", {0: "head backward 2"}),
    ("update", {1: "layer 1 backward 1"}),
    ("update", {1: "layer 0 backward 1"}),
    ("update", {0: "layer 1 backward 1", 1: "layer 0 forward 1"}),
]
FEW = [FAILURES[0], FAILURES[-2]]


@pytest.mark.skipif(not CAN_ANCHOR, reason="before torch 2.13 such a run ends, and resumes in shorter rows")
@pytest.mark.parametrize(
    ("size", "sequence", "model", "dtype", "checkpointing", "failures"),
    [
        pytest.param(4, 2, "adder", "float32", True, FEW, marks=pytest.mark.slow),
        pytest.param(2, 2, "adder", "float32", True, FAILURES, marks=pytest.mark.nightly),
        pytest.param(2, 1, "adder", "bfloat16", False, FAILURES, marks=pytest.mark.slow),
        pytest.param(2, 1, "untied", "float32", True, FAILURES, marks=pytest.mark.nightly),
        pytest.param(4, 2, "untied", "bfloat16", False, FAILURES, marks=pytest.mark.nightly),
    ],
)
def test_all_ranks_go_on_in_half_the_row_with_the_same_bits(
    size: int,
    sequence: int,
    model: str,
    dtype: str,
    checkpointing: bool,
    *,
    failures: list,
    request: pytest.FixtureRequest,
) -> None:
    path = request.getfixturevalue(model)
    config = ModelConfig(path=str(path), dtype=dtype, device="cpu", gradient_checkpointing=checkpointing)
    longest = longest_of(dist_work.sequences_of(dist_work.MANY))
    rows = (2 * longest + 6, longest + 3)
    small = {"max_tokens": rows[1], "out_of_memory": 0}
    every_rank = run_ranks(dist_work.update_out_of_memory, size, config, sequence, rows, failures)
    for want, *found in every_rank:
        assert want["told"] == [] and want["budgets"] == [small, small]
        for failure, got in zip(failures, found, strict=True):
            phase, places = failure
            halved = small | {"out_of_memory": 1}
            assert got["budgets"] == ([halved, small] if phase == "score" else [small, halved]), failure
            assert len(got["told"]) == 1, failure
            assert all(f"rank {rank}: CUDA out of memory" in got["told"][0] for rank in places), failure
            for what in ("old_logp", "grads", "weights"):
                for name, value in want[what].items():
                    assert np.array_equal(got[what][name], value), (failure, what, name)
            assert got["metrics"] == want["metrics"], failure
