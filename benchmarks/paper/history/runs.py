"""Training of every arm on its seeds, several runs at a time with one core each. Finished runs are reused."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.paper.history.arms import ARMS

Record = dict[str, Any]

# Metrics of every step that statements and plots read.
_SERIES = {
    "entropy": "policy/entropy",
    "reward": "reward/mean",
    "truncated": "completion/truncated",
    "length": "completion/len_mean",
    "coef": "policy/entropy_coef",
    "kept": "group/kept",
    "rollout_s": "time/rollout",
}


def ensure_base(work: Path) -> float:
    """Make the base model in work/base if absent. Return the CPU seconds that this took."""
    done = work / "base.json"
    if not done.exists():
        began = _cpu_seconds()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin) as pool:
            pool.submit(_make_base, work / "base").result()
        _write(done, {"cpu_s": _cpu_seconds() - began})
    return json.loads(done.read_text(encoding="utf-8"))["cpu_s"]


def run_all(
    pairs: Iterable[tuple[str, int]], work: Path, jobs: int, device: str, lr: float
) -> Iterator[tuple[str, int, Record]]:
    """Yield every (arm, seed, record) in order of completion. Raises the error of a failed run."""
    missing = {}
    for name, seed in pairs:
        settings = _settings(work, name, seed, device, lr)
        record = _finished(settings)
        if record is None:
            missing[name, seed] = settings
        else:
            yield name, seed, record
    # Spawned, because torch's threads do not run in a forked child.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    with pool:
        futures = {pool.submit(_run, *pair, settings): pair for pair, settings in missing.items()}
        try:
            for future in as_completed(futures):
                yield *futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def _make_base(folder: Path) -> None:
    from benchmarks.paper.history.task import make_base

    make_base(folder)


def _settings(work: Path, name: str, seed: int, device: str, lr: float) -> dict[str, Any]:
    run_dir = work / "runs" / f"{''.join(c if c.isalnum() or c == '.' else '_' for c in name)}-{seed}-{lr:g}"
    settings = ARMS[name].config(work / "base", run_dir, seed)
    settings["model"]["device"], settings["optim"]["lr"] = device, lr
    return settings


def _record_path(settings: Mapping[str, Any]) -> Path:
    run_dir = Path(settings["run_dir"])
    return run_dir.parents[1] / "records" / f"{run_dir.name}.json"


def _finished(settings: Mapping[str, Any]) -> Record | None:
    """Return the record of a finished run with equal settings, or None."""
    path = _record_path(settings)
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record["settings"] == settings else None


def _run(name: str, seed: int, settings: dict[str, Any]) -> Record:
    from benchmarks.lib.measure import stamp
    from or1.config import Config
    from or1.train.build import build
    from or1.trainer import Trainer

    run_dir, messages, began = Path(settings["run_dir"]), _Messages(), _cpu_seconds()
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    with build(Config.model_validate(settings), messages) as parts:
        Trainer(parts).run()
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = {
        "arm": name,
        "seed": seed,
        "commit": stamp()["commit"],
        "cpu_s": _cpu_seconds() - began,
        "messages": messages.texts,
        "settings": settings,
        **_summary([json.loads(line) for line in lines]),
    }
    _write(_record_path(settings), record)
    shutil.rmtree(run_dir)
    return record


def _summary(steps: list[Mapping[str, Any]]) -> dict[str, Any]:
    trained = [step for step in steps if step["step"] > 0]
    series = {name: _filled([step.get(key) for step in trained]) for name, key in _SERIES.items()}
    evals = [[step["step"], step["eval/test/avg@1"]] for step in steps if "eval/test/avg@1" in step]
    return {"series": series, "evals": evals}


def _filled(values: Sequence[float | None]) -> list[float]:
    """Return the values with gaps filled by the last value before them, or by the first value at the start.

    A step whose groups are all rejected has no entropy of kept responses. It changes no weight, so values stay valid.
    """
    last = next((value for value in values if value is not None), math.nan)
    filled = []
    for value in values:
        last = last if value is None else value
        filled.append(round(last, 5))
    return filled


class _Messages:
    """A display for Trainer that records its messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def begin(self, step: int) -> None:
        """Do nothing."""

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Do nothing."""

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Return a function that shows nothing."""
        return partial(self.phase, name)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Record the message."""
        self.texts.append(text)


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.replace(path)
