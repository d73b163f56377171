"""The runs of both tiers, several processes at a time with a core each. Finished runs are reused."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.arms import ARMS, MODEL_ARMS, MODEL_ROLLOUTS
from benchmarks.paper.claims import CLAIMS, MODEL_CLAIMS, Claim
from benchmarks.paper.measures import Check, Record, Records
from benchmarks.paper.rule import Finding, decide
from benchmarks.paper.statistics import LOOKS

TABLE_LR = 0.02
MODEL_LR = 1e-3
FIRST_SEED = 1001  # of both tiers; trials used seeds below 300
MODEL_SEEDS = 16
_BLOCK = 16  # seeds that a process of tier A trains at once
_POINTS = 40


@dataclass(frozen=True)
class Task:
    """Runs that a process makes together: seeds of one arm. tier: "A" or "B"."""

    tier: str
    arm: str
    seeds: tuple[int, ...]

    @property
    def file(self) -> str:
        """Name of the file of their records."""
        arm = "".join(c if c.isalnum() or c == "." else "_" for c in self.arm)
        return f"{self.tier}-{arm}-{self.seeds[0]}-{len(self.seeds)}.json"


def table_tasks(arms: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """Return the tasks of tier A."""
    blocks = [tuple(seeds[i : i + _BLOCK]) for i in range(0, len(seeds), _BLOCK)]
    return [Task("A", arm, block) for block in blocks for arm in arms]


def model_tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the tasks of tier B."""
    return [Task("B", arm, (seed,)) for seed in seeds for arm in MODEL_ARMS]


def run_all(tasks: Sequence[Task], work: Path, jobs: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of every task in order of completion. Raises the error of a failed task."""
    (work / "records").mkdir(parents=True, exist_ok=True)
    missing = []
    for task in tasks:
        path = work / "records" / task.file
        if path.exists():
            yield json.loads(path.read_text(encoding="utf-8"))
        else:
            missing.append(task)
    if not missing:
        return
    # Spawned, because torch's threads do not run in a forked child.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, task, work) for task in missing]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run(task: Task, work: Path) -> list[dict[str, Any]]:
    """Make the runs of a task and write their records."""
    import torch

    torch.set_num_threads(1)
    began = time.process_time()
    if task.tier == "A":
        from benchmarks.paper import tabular

        records = tabular.train(ARMS[task.arm], task.seeds, TABLE_LR, _POINTS)
    else:
        records = [_model_run(task.arm, seed, work) for seed in task.seeds]
    for record in records:
        record["tier"], record["cpu_s"] = task.tier, (time.process_time() - began) / len(records)
    write(work / "records" / task.file, records)
    return records


def ensure_base(work: Path) -> float:
    """Make the base model of tier B in work/base if absent. Return the CPU seconds that this took."""
    done = work / "base.json"
    if not done.exists():
        from benchmarks.paper import model

        began = time.process_time()
        model.make_base(work / "base")
        write(done, time.process_time() - began)
    return float(json.loads(done.read_text(encoding="utf-8")))


def _model_run(arm: str, seed: int, work: Path) -> dict[str, Any]:
    from dataclasses import replace

    from transformers.utils import logging

    from benchmarks.paper import model

    logging.disable_progress_bar()
    chosen = replace(ARMS[arm], rollouts=MODEL_ROLLOUTS)
    run_dir = work / f"run-{os.getpid()}"
    return model.train(chosen, seed, MODEL_LR, work / "base", run_dir, MODEL_ROLLOUTS // _POINTS)


def of_tier(records: Sequence[Record], tier: str) -> Records:
    """Return the records of a tier by arm and seed."""
    return {(r["arm"], r["seed"]): r for r in records if r["tier"] == tier}


def findings(claim: Claim, records: Records, looks: Sequence[int]) -> tuple[list[Check], list[Finding]]:
    """Return the manipulation check and the finding of each statement. The statements of a claim are a family."""
    checks = [statement.check(records) for statement in claim.statements]
    questions = [s.question(records, check) for s, check in zip(claim.statements, checks, strict=True)]
    return checks, decide(questions, looks)


def complete(records: Records, looks: Sequence[int] = LOOKS) -> bool:
    """Return True if no statement of tier A is undecided, so that the study may end at this look."""
    return all(f.verdict != "undecided" for claim in CLAIMS for f in findings(claim, records, looks)[1])


def looks_of(tier: str, records: Records) -> tuple[int, ...]:
    """Return the numbers of seeds at which a tier is looked at. Tier B: once, at the seeds that it has."""
    return LOOKS if tier == "A" else (len({seed for _, seed in records}),)


def claims_of(tier: str) -> tuple[Claim, ...]:
    """Return the claims of a tier."""
    return CLAIMS if tier == "A" else MODEL_CLAIMS


def write(path: Path, value: object) -> None:
    """Write JSON at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
    partial.replace(path)
