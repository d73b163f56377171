"""Whole runs of `or1 train` on 1, 2 and 4 ranks: the same prompts in the same order, the same loss curve."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from or1.run.checkpoint import committed_steps, load_checkpoint
from tests.helpers.ranks import or1_ranks
from tests.helpers.small_run import arguments, lines

CURVES = {"optim/loss": 1e-4, "optim/grad_norm": 1e-4, "policy/entropy": 1e-4, "reward/mean": 0.0}


def compare(run_dir: Path, other: Path, steps: int) -> None:
    ours, theirs = lines(run_dir), lines(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(steps + 1))
    for a, b in zip(ours, theirs, strict=True):
        for name, bound in CURVES.items():
            # Step 0 and empty steps have no loss.
            assert (name in a) == (name in b), (a["step"], name)
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=bound, abs=1e-7), (a["step"], name)
    for step in range(1, steps + 1):
        tables = [pq.read_table(run / "rollouts" / f"step_{step}.parquet") for run in (run_dir, other)]
        for column in ("prompt_id", "token_ids", "reward", "advantage"):
            assert tables[0][column].equals(tables[1][column]), (step, column)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_responses_continued_under_later_policies_are_equal_on_two_ranks(tmp_path: Path) -> None:
    settings = {"stage__0__steps": 3, "stage__1__steps": 2, "rollout__partial_tokens": 16, "loss__is_cap": 2.0}
    for size in (1, 2):
        assert or1_ranks(size, arguments(tmp_path / str(size), **settings), tmp_path / "log") == [0] * size
    compare(tmp_path / "2", tmp_path / "1", 5)
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "step_3").state["in_flight"] for name in ("1", "2")]
    assert states[0] == states[1] and states[0]["groups"], "some group was open"


WORLDS = {"1": (1, 1), "2": (2, 1), "4": (4, 1), "2 by 2": (2, 2), "4 by 2": (4, 2)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["1", "2", "2 by 2"], marks=pytest.mark.slow),
        pytest.param(["1", "4", "4 by 2"], marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
    ids=" ".join,
)
def test_twenty_steps_have_the_same_curve_on_any_ranks(tmp_path: Path, names: list[str]) -> None:
    """1, 2 and 4 ranks, also with sequence parallelism 2; a held-out set; two updates a step in the first stage."""
    heldout = Path(arguments(tmp_path)[1]).parent / "tiny-adder" / "heldout.jsonl"
    sets = f'[{{name="greedy", path="{heldout}", temperature=0.0, limit=5}}]'
    settings = {
        "stage__0__steps": 12,
        "stage__1__steps": 8,
        "stage__0__minibatch_prompts": 2,
        "checkpoint__every_steps": 20,
        "eval__sets": sets,
    }
    for name in names:
        size, sequence = WORLDS[name]
        command = arguments(tmp_path / name, dist__sequence_parallel=sequence, **settings)
        assert or1_ranks(size, command, tmp_path / f"log {name}", timeout=300) == [0] * size
        compare(tmp_path / name, tmp_path / "1", 20)
        for a, b in zip(lines(tmp_path / name), lines(tmp_path / "1"), strict=True):
            assert a.get("eval/greedy/avg@1") == b.get("eval/greedy/avg@1")
    assert committed_steps(tmp_path / names[-1] / "checkpoints") == [20]
    assert (tmp_path / names[-1] / "weights" / "step_20" / "model.safetensors").is_file()
    assert (tmp_path / names[-1] / "report.html").is_file()


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_same_ranks_give_the_same_bits(tmp_path: Path) -> None:
    settings = {
        "stage__0__steps": 12,
        "stage__1__steps": 8,
        "stage__0__prompts_per_step": 8,
        "stage__1__prompts_per_step": 8,
        "checkpoint__every_steps": 20,
    }
    for name in ("once", "again"):
        assert or1_ranks(2, arguments(tmp_path / name, **settings), tmp_path / f"log {name}", timeout=300) == [0, 0]
    twice = [load_checkpoint(tmp_path / name / "checkpoints" / "step_20") for name in ("once", "again")]
    assert twice[0].state == twice[1].state
    assert all(t.equal(twice[1].tensors[name]) for name, t in twice[0].tensors.items())
