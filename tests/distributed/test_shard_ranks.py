"""dist.shard_ranks on 4 gloo ranks: copies of the model, each sharded over a group of ranks (HSDP)."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from or1.config import ModelConfig
from or1.dist.oom_peers import CAN_ANCHOR
from or1.run.checkpoint import load_checkpoint, verify_checkpoint
from or1.train.rank_rows import longest_of
from tests.distributed.test_gradients import NUMBERS, relative, relative_whole
from tests.helpers import dist_work
from tests.helpers.ranks import or1_ranks, run_ranks
from tests.helpers.small_run import arguments, lines

COUNTS = [13, -13]


@pytest.mark.slow
@pytest.mark.parametrize(("shard_ranks", "sequence"), [(2, 1), (1, 2)])
def test_gradients_are_those_of_one_process_and_equal_on_all_copies(
    shard_ranks: int, sequence: int, adder: Path
) -> None:
    work = partial(dist_work.one_update, shard_ranks=shard_ranks)
    alone = run_ranks(dist_work.one_update, 1, adder, "float32", 1, COUNTS)[0]
    every_rank = run_ranks(work, 4, adder, "float32", sequence, COUNTS)
    for results in every_rank:
        for want, got in zip(alone, results, strict=True):
            assert relative_whole(got["grads"], want["grads"]) < 1e-6
            assert max(relative(got["grads"], want["grads"]).values()) < 5e-6
            for name in NUMBERS:
                assert got["metrics"][name] == pytest.approx(want["metrics"][name], rel=1e-6, abs=1e-7), name
        for first, other in zip(every_rank[0], results, strict=True):
            assert first["metrics"] == other["metrics"]
            for what in ("grads", "weights"):
                assert all(np.array_equal(first[what][name], value) for name, value in other[what].items())


def test_ranks_that_do_not_divide_are_refused(adder: Path) -> None:
    work = partial(dist_work.one_update, shard_ranks=3)
    with pytest.raises(AssertionError, match=r"shard_ranks = 3 does not divide the 2 ranks.*GPUs of a node"):
        run_ranks(work, 2, adder, "float32", 1, COUNTS)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.nightly
def test_a_run_resumes_bit_for_bit_and_under_other_groups(tmp_path: Path) -> None:
    settings = {"stage__0__steps": 2, "stage__1__steps": 1, "dist__shard_ranks": 2}
    whole = tmp_path / "whole"
    assert or1_ranks(4, arguments(whole, **settings), tmp_path / "log") == [0] * 4
    files = verify_checkpoint(whole / "checkpoints" / "step_3")["files"]
    sizes = [files[f"shard_{rank}.safetensors"]["bytes"] for rank in range(4)]
    assert max(sizes[2:]) < 1000 < min(sizes[:2]), "the second copy is not written again"

    for ranks, shards in ((4, 2), (2, 1)):
        run = shutil.copytree(whole, tmp_path / f"on {ranks}")
        shutil.rmtree(run / "checkpoints" / "step_3")
        (run / ".marks.json").unlink()
        command = arguments(run, **settings | {"dist__shard_ranks": shards})
        assert or1_ranks(ranks, command, tmp_path / "log") == [0] * ranks
        assert "resumed after step 2" in Path(f"{tmp_path}/log.0").read_text()
        first, second = (load_checkpoint(each / "checkpoints" / "step_3") for each in (whole, run))
        if ranks == 4:
            assert first.state == second.state
            assert all(t.equal(second.tensors[name]) for name, t in first.tensors.items())
        for a, b in zip(lines(run), lines(whole), strict=True):
            assert a.get("optim/loss", 0.0) == pytest.approx(b.get("optim/loss", 0.0), rel=1e-4, abs=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_ANCHOR, reason="before torch 2.13 such a run ends, and resumes in shorter rows")
def test_memory_that_runs_out_in_one_copy_starts_the_update_of_all_again(adder: Path) -> None:
    config = ModelConfig(path=str(adder), dtype="float32", device="cpu")
    longest = longest_of(dist_work.sequences_of(dist_work.MANY))
    rows, failures = (2 * longest + 6, longest + 3), [("update", {3: "layer 0 backward 1"})]
    work = partial(dist_work.update_out_of_memory, shard_ranks=2)
    for want, got in run_ranks(work, 4, config, 1, rows, failures):
        assert "rank 3: CUDA out of memory" in got["told"][0] and got["metrics"] == want["metrics"]
        assert all(np.array_equal(got["grads"][name], value) for name, value in want["grads"].items())
