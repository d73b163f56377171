"""A run directory, read back for the report: metrics by step, and the config.

Reading is tolerant, because a run may be alive, killed in the middle of a line, or resumed. `RecordedRun.notes` counts
what is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from or1.config import Config, StageConfig
from or1.core.errors import ReportError
from or1.core.records import Record, number
from or1.report.records import sampled, step_seconds
from or1.reward.terms import NO_THINK_CLOSE, graded_run, no_think_close
from or1.run.directory import all_stages_ended
from or1.run.marks import read_marks
from or1.run.metrics_log import read_lines

_LARGEST = 1e100
"""Larger numbers are not metrics of a run, and their sums overflow."""
KEPT_SHARE = "group/kept_share"  # derived here, not in metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """The records of a run.

    config      None if config.resolved.json is missing or does not fit this version of or1
    raw_config  config.resolved.json as it is; empty if missing
    records     one mapping a step, ascending, at least one
    notes       what was left out, for a person
    """

    path: Path
    config: Config | None
    raw_config: Mapping[str, Any]
    records: tuple[Record, ...]
    notes: tuple[str, ...]

    @property
    def last_step(self) -> int:
        """The newest recorded step."""
        return self.records[-1]["step"]

    @property
    def total_steps(self) -> int | None:
        """The number of steps in the config, or None without a readable config."""
        return None if self.config is None else self.config.total_steps

    @property
    def finished(self) -> bool:
        """Whether the last step is done. A stage with `until = "plateau"` may end before its `steps`."""
        if self.config is None or self.last_step >= self.config.total_steps:
            return self.config is not None
        early = any(stage.until == "plateau" for stage in self.config.stage)
        return early and all_stages_ended(self.path, self.last_step, len(self.config.stage))

    def series(self, key: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
        """Return steps and values of one metric, without steps in which the value is missing or not finite."""
        pairs = [(record["step"], number(record.get(key)) * scale) for record in self.records]
        pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def stage_of(self, record: Record) -> StageConfig | None:
        """Return the stage of a record, or None if it is unknown."""
        index = record.get("stage")
        if self.config is None or not _is_count(index) or index >= len(self.config.stage):
            return None
        return self.config.stage[index]

    def stage_starts(self) -> list[tuple[int, int]]:
        """Return (first recorded training step, stage index) of each stage that has begun."""
        starts: list[tuple[int, int]] = []
        for record in self.records:
            index = record.get("stage")
            if record["step"] > 0 and _is_count(index) and (not starts or starts[-1][1] != index):
                starts.append((record["step"], index))
        return starts

    @cached_property
    def graded(self) -> bool:
        """Whether any reward is neither 0 nor 1; see `or1.reward.terms`."""
        return graded_run(self.records)

    def responses(self, record: Record) -> int:
        """Return the number of responses sampled for training in a step; 0 if unknown."""
        return sampled(record, () if self.config is None else self.config.stage)

    def count(self, shares: Sequence[float]) -> int:
        """Return the number of training responses in a share of each record."""
        pairs = zip(self.records, shares, strict=True)
        return round(math.fsum(number(share, 0.0) * self.responses(record) for record, share in pairs))

    def total(self, key: str) -> float:
        """Return the sum of a metric over the steps that recorded a finite value."""
        return math.fsum(self.series(key)[1])

    def health_counts(self) -> dict[str, int]:
        """Return counts of problems over the whole run, by name; counts that were not recorded are left out."""
        shares = {"truncated responses": "completion/truncated", "without an answer": "reward/status/no_answer"}
        shares |= {"verifier timeouts": "reward/status/timeout", "verifier crashes": "reward/status/crash"}
        shares |= {"rewards that were None": "reward/status/skipped"}
        counts = {
            label: self.count([number(record.get(key)) for record in self.records])
            for label, key in shares.items()
            if self.series(key)[0]
        }
        if unclosed := self.count([no_think_close(record) for record in self.records]):
            counts[NO_THINK_CLOSE] = unclosed
        if self.series("optim/skipped")[0]:
            counts["skipped updates"] = round(self.total("optim/skipped"))
        if self.series("group/kept")[0]:
            counts["empty steps"] = self.series("group/kept")[1].count(0.0)
        return counts

    def wall_seconds(self) -> float:
        """Return the time spent in steps; clock times would include the hours between a crash and its resume."""
        return math.fsum(map(step_seconds, self.records))


def load_run(run_dir: Path) -> RecordedRun:
    """Read metrics and config of a run directory. Raises ReportError if it is not one or has no step yet."""
    run_dir = Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise ReportError(f"{run_dir} is not a folder; give the run_dir of an `or1 train`")
    if not metrics.is_file():
        raise ReportError(f"{run_dir} is not a run: it has no metrics.jsonl; give the run_dir of an `or1 train`")
    try:
        lines = metrics.read_bytes().split(b"\n")
    except OSError as error:
        raise ReportError(f"{metrics} cannot be read: {error.strerror}") from error
    records, notes = _parse(lines)
    found, committed = read_lines(metrics), read_marks(run_dir).get("committed", 0)
    if altered := sorted(found.altered):
        notes.append(
            f"metrics.jsonl: the lines of {len(altered)} steps are not as they were written (first: step {altered[0]})."
        )
    if committed and (missing := sorted(set(range(committed + 1)) - found.lines.keys())):
        notes.append(f"metrics.jsonl has no line of {len(missing)} steps that the run did (first: step {missing[0]}).")
    if not records and read_marks(run_dir).get("committed"):
        raise ReportError(
            f"{metrics} holds no step, though the run did some: the file was damaged; restore the file, or "
            "resume the run, whose later steps can be reported"
        )
    if not records:
        raise ReportError(f"{metrics} holds no complete step yet; try again after the first evaluation or step")
    raw, config, config_notes = _load_config(run_dir / "config.resolved.json")
    run = RecordedRun(
        path=run_dir, config=config, raw_config=raw, records=tuple(records), notes=tuple(notes + config_notes)
    )
    return replace(run, records=tuple(_with_kept_share(run, record) for record in records))


def _with_kept_share(run: RecordedRun, record: Record) -> Record:
    """Return the record with group/kept divided by the stage's prompts per step, which differ between stages."""
    stage = run.stage_of(record)
    if stage is None:
        return record
    return {**record, KEPT_SHARE: number(record.get("group/kept")) / stage.prompts_per_step}


def _parse(lines: list[bytes]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the complete records by step, and notes on what was left out."""
    records: list[dict[str, Any]] = []
    bad: list[int] = []
    notes: list[str] = []
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line)
        if record is None:
            bad.append(index)
        elif records and records[-1]["step"] == record["step"]:
            records[-1].update(record)
        else:
            # A resume continues from a checkpoint and repeats the later steps: drop their earlier records.
            if records and record["step"] < records[-1]["step"]:
                notes.append(f"The run went back from step {records[-1]['step']} to {record['step']} (a resume).")
                records = [old for old in records if old["step"] < record["step"]]
            records.append(record)
    if bad and bad[-1] == len(lines):
        bad.pop()
        notes.append("The last line of metrics.jsonl is incomplete: the run is writing it, or was killed there.")
    if bad:
        notes.append(f"metrics.jsonl: {len(bad)} unreadable lines left out (first: line {bad[0]}).")
    return records, notes


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not _is_count(record.get("step")):
        return None
    return {key: value for key, value in record.items() if not abs(number(value, 0.0)) > _LARGEST}


def _is_count(value: object) -> TypeGuard[int]:
    """Return whether a value can be a step or a stage index; the upper bound protects the plots."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**9


def _load_config(path: Path) -> tuple[dict[str, Any], Config | None, list[str]]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError:
        return {}, None, ["config.resolved.json is missing: no limits, targets or token counts below."]
    except (ValueError, RecursionError):
        return {}, None, ["config.resolved.json is not valid JSON: no limits, targets or token counts below."]
    try:
        return raw, Config.model_validate(raw), []
    except (ValidationError, RecursionError) as error:
        problems = f"{error.error_count()} problems" if isinstance(error, ValidationError) else "nested too deeply"
        note = f"config.resolved.json does not fit this version of or1 ({problems})."
        return (raw if isinstance(raw, dict) else {}), None, [note]
