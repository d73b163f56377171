"""A rank that runs out of memory in a row: no other waits for it, and all start the update again in smaller rows."""

from __future__ import annotations

from pathlib import Path

import dist_work
import numpy as np
import pytest
from rank_processes import run_ranks

from or1.update import longest_of

# Which rank, and where: among a row's first collectives, in its midst, at its last; in a later row; on both ranks.
FAILURES = [("score", {1: "layer 0 forward 1"}), ("score", {0: "head forward 2"}),
            ("update", {1: "layer 0 forward 1"}), ("update", {0: "layer 1 forward 2"}),
            ("update", {1: "head forward 1"}), ("update", {0: "head backward 2"}),
            ("update", {1: "layer 1 backward 1"}), ("update", {1: "layer 0 backward 1"}),
            ("update", {0: "layer 1 backward 1", 1: "layer 0 forward 1"})]  # fmt: skip
FEW = [FAILURES[0], FAILURES[-2]]


@pytest.mark.parametrize(("size", "sequence", "checkpointing", "model", "failures"), [
    (2, 2, True, "adder", FEW),
    pytest.param(2, 2, True, "adder", FAILURES, marks=pytest.mark.slow),
    pytest.param(2, 1, False, "adder", FAILURES, marks=pytest.mark.slow),
    pytest.param(2, 1, True, "untied", FAILURES, marks=pytest.mark.slow),
    pytest.param(4, 2, False, "untied", FAILURES, marks=pytest.mark.slow),
])  # fmt: skip
def test_all_ranks_go_on_in_half_the_row_with_the_same_bits(
    size: int, sequence: int, checkpointing: bool, model: str, failures: list, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(model)
    longest = longest_of(dist_work.sequences_of(dist_work.MANY))
    rows = (2 * longest + 6, longest + 3)
    small = {"max_tokens": rows[1], "out_of_memory": 0}
    every_rank = run_ranks(dist_work.update_out_of_memory, size, path, sequence, checkpointing, rows, failures)
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
