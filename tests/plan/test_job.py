"""Limits of a job against the steps of the report's recipe: no clock here is real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from or1.cli import main
from or1.config import Config
from or1.config.load import load_config
from or1.plan.job import (
    DEFAULT_GRACE_S,
    JobLimits,
    StepSeconds,
    checkpoint_gap,
    gpus_of_job,
    grace_of,
    job_warnings,
    measured_step,
)

DAY = 86400.0
# Math-7B on H100s, seconds of a step of stages 3 and 3.5 by GPUs, and the share that the rollout has of it.
STEPS = [(64, 1210.0), (32, 2326.0), (16, 4558.0), (8, 4558.0), (8, 9022.0)]
ROLLOUT = 0.73


def recipe(root: Path, *overrides: str) -> Config:
    return load_config(root / "examples" / "recipes" / "or1-math-7b.toml", overrides, files=False)


def step(seconds: float) -> StepSeconds:
    return StepSeconds("stage 3", seconds, (1 - ROLLOUT) * seconds)


@pytest.mark.parametrize(("gpus", "seconds"), STEPS)
def test_by_steps_alone_a_day_may_end_without_a_checkpoint_and_by_time_it_does_not(
    gpus: int, seconds: float, root: Path
) -> None:
    by_steps = recipe(root).model_copy(update={"checkpoint": {}})
    by_steps = Config.model_validate(by_steps.model_dump() | {"checkpoint": {"every_steps": 20}})
    limits = JobLimits(DAY, 1e9)
    lost = [line for line in job_warnings(by_steps, [step(seconds)], limits) if "all its work is lost" in line]
    assert bool(lost) == (seconds > DAY / 20), gpus
    assert all("25 h" in line or "50 h" in line for line in lost)
    assert job_warnings(recipe(root), [step(seconds)], limits) == []
    assert checkpoint_gap(recipe(root), seconds) <= 3600 + seconds


@pytest.mark.parametrize(("gpus", "seconds"), STEPS)
def test_the_grace_of_fifteen_minutes_is_named_where_it_is_too_short(gpus: int, seconds: float, root: Path) -> None:
    (*found,) = job_warnings(recipe(root), [step(seconds)], JobLimits(DAY))
    too_short = (1 - ROLLOUT) * seconds > DEFAULT_GRACE_S
    assert len(found) == too_short, gpus
    grace = grace_of([step(seconds)])
    assert grace > (1 - ROLLOUT) * seconds
    assert not found or f"a grace of {grace} s" in found[0]
    assert job_warnings(recipe(root), [step(seconds)], JobLimits(DAY, grace)) == []


def test_a_step_longer_than_its_job_is_named(root: Path) -> None:
    assert any("a step takes" in line for line in job_warnings(recipe(root), [step(9022)], JobLimits(7200.0, 1e9)))


def test_the_limits_of_a_slurm_job_are_found_and_options_come_first() -> None:
    job = {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": "87400"}
    assert JobLimits.found(None, None, job) == JobLimits(DAY, DEFAULT_GRACE_S)
    assert JobLimits.found(2, 60, job) == JobLimits(7200.0, 60)
    for broken in ({}, {"SLURM_JOB_END_TIME": "87400"}, job | {"SLURM_JOB_END_TIME": "soon"}):
        assert JobLimits.found(None, None, broken).job_s is None
    assert gpus_of_job({"SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8"}) == 32
    assert gpus_of_job({"WORLD_SIZE": "16"}) == 16 and gpus_of_job({}) == 1


def test_measured_steps_decide_the_grace_that_a_job_script_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "examples/quickstart.toml", "--set", f"run_dir={tmp_path}", "--grace"]
    assert main(command) == 0
    assert int(capsys.readouterr().out) == 300, "seconds a step by the plan"
    rows = [(1, 4000.0, 3000.0), (2, 5200.0, 3200.0), (3, 4100.0, None)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for number, whole, rollout in rows:
            file.write(json.dumps({"step": number, "time/step": whole, "time/rollout": rollout}) + "\n")
    measured = measured_step(tmp_path)
    assert measured is not None and (measured.whole, measured.after) == (5200.0, 4100.0)
    assert main(command) == 0
    assert int(capsys.readouterr().out) == grace_of([measured]) == 5305


@pytest.mark.slow
def test_a_dry_run_in_a_job_that_is_too_short_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step": 5000, "time/rollout": 100}\n')
    command = ["train", "examples/quickstart.toml", "--set", f"run_dir={tmp_path}", "--dry-run"]
    assert main(command) == 0 and "WARNING" not in capsys.readouterr().err
    assert main([*command, "--job-hours", "2"]) == 0
    said = capsys.readouterr().err
    assert "more than the grace of 15 min" in said and "all its work is lost" in said
    monkeypatch.setenv("SLURM_JOB_START_TIME", "0")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "7200")
    assert main(command) == 0 and "all its work is lost" in capsys.readouterr().err
