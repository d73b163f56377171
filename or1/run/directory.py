"""What survives a crash, and the run directory that holds it."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from or1.config import Config
from or1.config.changes import changed_keys, described, fixed_keys
from or1.config.load import dump_config
from or1.core.files import NO_ROOM, fsync, without_links, write_whole
from or1.core.types import Group, Status
from or1.data import SamplerState, SolvedPrompts
from or1.magic.alarms import EntropyWatch
from or1.magic.entropy import EntropyController
from or1.magic.stages import StageProgress
from or1.magic.unknown_logp import unknown_tokens
from or1.run.checkpoint import CheckpointError, read_manifest, step_folder, step_folders
from or1.run.in_flight import InFlight
from or1.run.marks import NAME as MARKS
from or1.run.marks import is_altered, lost_history, mark_record
from or1.run.metrics_log import read_metrics
from or1.run.places import unusable

if TYPE_CHECKING:
    from or1.eval.accuracy import EvalResult

RECORD = "config.resolved.json"
"""The settings of a run, in its folder."""
# Left by a run that ended out of memory.
_ROW_CAP = "row_tokens.json"


class RunError(ValueError):
    """A run directory that cannot be used as asked; the message names it and the remedy."""


@dataclass
class TrainState:
    """Everything a resumed run needs beside weights and optimizer moments; what is not here is not resumed.

    Random numbers need no state: every step seeds its own from (seed, step).
    """

    entropy: EntropyController
    step: int = 0
    sampler: SamplerState = field(default_factory=SamplerState)
    solved: SolvedPrompts = field(default_factory=SolvedPrompts)
    policy_version: int = 0
    updates: int = 0
    nonfinite_in_a_row: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    stages: StageProgress = field(default_factory=StageProgress)
    watch: EntropyWatch = field(default_factory=EntropyWatch)
    budget: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """See `or1.data.fingerprint.inputs_of`."""
    in_flight: InFlight = field(default_factory=InFlight)
    """Saved apart, since most of it is tensors; see `InFlight.to_checkpoint`."""

    @classmethod
    def start(cls, config: Config) -> TrainState:
        """Before the first step."""
        return cls(entropy=EntropyController.start(config.loss.entropy))

    def note_update(self, took: bool, limit: int) -> None:
        """Count an update that was skipped for a non-finite loss or gradient.

        Raises RunError after `limit` of them in a row.
        """
        self.totals["skipped_updates"] += not took
        self.nonfinite_in_a_row = 0 if took else self.nonfinite_in_a_row + 1
        if self.nonfinite_in_a_row >= limit:
            raise RunError(
                f"{limit} updates in a row had a non-finite loss or gradient (optim.max_nonfinite_steps); the weights "
                "are those before them. Lower optim.lr, or look at the last rollouts for the cause"
            )

    def note_evaluation(self, result: EvalResult, own_function: bool) -> str:
        """Count what failed in an evaluation; returns a remark on the rewards of an own function, once in a run."""
        self.totals["eval_crashes"] += result.count(Status.CRASH)
        self.totals["eval_timeouts"] += result.count(Status.TIMEOUT)
        remark = result.remark() if own_function and not self.totals["eval_remarks"] else ""
        self.totals["eval_remarks"] += bool(remark)
        return remark

    def note_inputs(self, found: dict[str, str]) -> list[str]:
        """Remember what the run reads; returns and counts what has changed since the checkpoint, one line each."""
        changed = [name for name in found if self.inputs.get(name, found[name]) != found[name]]
        self.totals["changed_inputs"] += len(changed)
        self.inputs = found
        return [f"{name} changed since step {self.step}: what follows is not the run that it was" for name in changed]

    def count(self, groups: Sequence[Group]) -> None:
        """Count what became of the responses of a step."""
        for group in groups:
            self.totals.update(score.status.value for score in group.scores)
            self.totals["graded_truncated"] += sum(
                r.truncated and s.status is not Status.TRUNCATED
                for r, s in zip(group.responses, group.scores, strict=True)
            )
            self.totals["stragglers"] += sum(r.finish == "deadline" for r in group.responses)
        self.totals["nonfinite_logp"] += unknown_tokens(groups)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return {
            "inputs": self.inputs,
            "entropy": self.entropy.state(),
            "step": self.step,
            "sampler": asdict(self.sampler),
            "solved": self.solved.state(),
            "policy_version": self.policy_version,
            "updates": self.updates,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "totals": dict(self.totals),
            "budget": self.budget,
            "stages": self.stages.to_json(),
            "watch": self.watch.to_json(),
        }

    @classmethod
    def from_json(cls, config: Config, data: dict[str, Any]) -> TrainState:
        """The inverse of `to_json`; nothing is in flight."""
        return cls(
            **{name: value for name, value in data.items() if name != "in_flight"}
            | {
                "entropy": EntropyController.start(config.loss.entropy).restore(data["entropy"]),
                "sampler": SamplerState(**data["sampler"]),
                "solved": SolvedPrompts.from_state(data["solved"]) if "solved" in data else SolvedPrompts(),
                "totals": Counter(data["totals"]),
                "stages": StageProgress.from_json(data["stages"]),
                "watch": EntropyWatch.from_json(data["watch"]),
            }
        )


def prepare_run_dir(config: Config, fresh: bool = False) -> list[str]:
    """Make the run directory and record the resolved config in it. Returns messages worth showing.

    A directory that holds a run is resumed. `fresh` moves it aside instead; nothing is deleted. Raises RunError as
    `check_run_dir` does, and if the folder cannot be made, or is to be moved and holds no run.
    """
    run_dir, messages = config.run_path, []
    try:
        if fresh and run_dir.is_dir():
            messages += _move_aside(run_dir)
        changed = check_run_dir(config)
        run_dir.mkdir(parents=True, exist_ok=True)
        # A local model by its whole path, so that `or1 export` finds it from any folder.
        model = config.model.model_copy(update={"path": _whole_path(config.model.path)})
        text = dump_config(config.model_copy(update={"model": model}))
        messages += _remarks(run_dir, changed)
        mark_record(run_dir, text)
        write_whole(run_dir / RECORD, text)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise RunError(f"run_dir = {str(run_dir)!r} cannot be a run's folder ({error}); choose another") from error
    return messages + ([f"continues with changed settings: {', '.join(changed)}"] if changed else [])


def _remarks(run_dir: Path, changed: list[str]) -> list[str]:
    """Return what is odd about a folder that may be gone on with."""
    said = []
    if changed and is_altered(run_dir, (run_dir / RECORD).read_bytes()):
        said.append(f"{run_dir / RECORD} was changed since the run wrote it; it is written anew from these settings")
    done = [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")]
    if done and max(done) > 0 and not step_folders(checkpoints_of(run_dir)):
        said.append(f"no checkpoint was committed in {max(done)} steps; the run begins again at step 0")
    return said


def require_movable(run_dir: Path) -> None:
    """Raise RunError if --fresh cannot move what is in the folder aside."""
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    if Path.cwd().is_relative_to(run_dir.resolve()):
        raise RunError(f"run_dir = {str(run_dir)!r} is the folder that this command runs in, or holds it, so --fresh "
                       "cannot move it aside; start from another folder, or choose one with --set run_dir=...")
    if not any((run_dir / name).exists() for name in (RECORD, "metrics.jsonl", "checkpoints")):
        raise RunError(f"{run_dir} holds no run (it has no {RECORD}), so --fresh leaves it where it is; choose another "
                       "folder with --set run_dir=..., or train beside what is there, without --fresh")


def _move_aside(run_dir: Path) -> list[str]:
    require_movable(run_dir)
    if not any(run_dir.iterdir()):
        return []
    # Behind a link the folder itself is moved, and made anew: the disk that the link leads to was chosen.
    run_dir = run_dir.resolve()
    aside = run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    run_dir.rename(aside)
    run_dir.mkdir()
    return [f"moved the former run to {aside}"]


def check_run_dir(config: Config) -> list[str]:
    """The settings in which the config differs from the run that its folder holds, if that may go on with them.

    Where nothing was trained there is nothing to go on from, and any config will do. Raises RunError for a run with
    settings that a resumed run must not change, or that does not say with which it was started.
    """
    run_dir = config.run_path
    if problem := unusable(run_dir):
        raise RunError(problem)
    if run_dir.exists() and not run_dir.is_dir():
        raise RunError(f"run_dir = {str(run_dir)!r} is a file; choose another, with --set run_dir=...")
    recorded = recorded_config(run_dir) if (run_dir / RECORD).is_file() else {}
    if lost := lost_history(run_dir, _checkpoint_every(recorded, config)):
        raise RunError(lost)
    steps = step_folders(checkpoints_of(run_dir))
    if not recorded or (not steps and not read_metrics(run_dir / "metrics.jsonl")):
        return []
    settings = config.model_dump(mode="json")
    for each in (recorded, settings):
        # The folder is the run's identity, by whatever path.
        each.pop("run_dir", None)
        if isinstance(model := each.get("model"), dict) and "path" in model:
            model["path"] = _whole_path(str(model["path"]))
    changed = changed_keys(recorded, settings)
    done, begun = _stages_so_far(run_dir, steps)
    if fixed := fixed_keys(changed, done, begun, len(config.stage)):
        stages = ("; of a stage that has begun only steps, until, plateau_evals and plateau_gain may change, and only "
                  "until it ends, or if it is the last") if any(key.startswith("stage.") for key in fixed) else ""
        altered = (f" (its {RECORD} was changed since the run wrote it: put that file back, or remove it and repeat "
                   "this command)") if is_altered(run_dir, (run_dir / RECORD).read_bytes()) else ""  # fmt: skip
        raise RunError(
            f"{run_dir} holds a run with other settings ({', '.join(fixed)}){stages}{altered}: "
            f"{described(fixed, recorded, settings)}. Set the old values to go on with that run, choose another folder "
            "with --set run_dir=..., or start anew with --fresh, which moves the old run aside"
        )
    return changed


def _checkpoint_every(recorded: dict[str, Any], config: Config) -> int:
    found = recorded.get("checkpoint")
    every = found.get("every_steps") if isinstance(found, dict) else None
    return every if type(every) is int and every > 0 else config.checkpoint.every_steps


def _whole_path(model: str) -> str:
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _stages_so_far(run_dir: Path, steps: list[int]) -> tuple[int, int]:
    """How many stages have ended, and how many have had a step, by the newest checkpoint that can be read."""
    for step in reversed(steps):
        try:
            state = read_manifest(step_folder(checkpoints_of(run_dir), step))["state"]
            stages = StageProgress.from_json(state["stages"])
            return stages.index, stages.index + (state["step"] > stages.began)
        except (CheckpointError, ValueError, TypeError, LookupError, AttributeError):
            continue
    return 0, 0


def recorded_config(run_dir: Path) -> dict[str, Any]:
    """The settings that a run recorded, not yet validated. Raises RunError if it recorded none that can be read."""
    record = run_dir / RECORD
    if not record.is_file():
        raise RunError(f"{run_dir} has no {RECORD}, so it is not a run; name a run directory")
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}")
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{record} does not hold a run's settings ({error}); put it back as it was, or remove it and repeat the "
            "`or1 train` command that began the run: it resumes, and writes the file anew"
        ) from error
    return settings


def require_own_record(run_dir: Path) -> None:
    """Raise RunError if the settings in a run's folder are not those that the run wrote there."""
    if is_altered(run_dir, (run_dir / RECORD).read_bytes()):
        raise RunError(
            f"{run_dir / RECORD} was changed since the run wrote it; put it back as it was, or remove it and repeat "
            f"the `or1 train` command that began the run. If you meant to change it, remove {run_dir / MARKS}"
        )


def recorded_run(run_dir: Path) -> Config:
    """The config that a run recorded. Raises RunError if it recorded none that this or1 can read."""
    settings = recorded_config(run_dir)
    require_own_record(run_dir)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{run_dir / RECORD} is not the record of a run of this or1 ({error.error_count()} problems; {where}: "
            f"{first['msg']}); name another folder, or use the or1 that wrote it"
        ) from error


def cap_rows(run_dir: Path, max_tokens: int) -> None:
    """Let the next start of the run pack rows of at most `max_tokens`, whatever its checkpoint says."""
    partial = run_dir / f".{_ROW_CAP}.{os.getpid()}"
    with open(partial, "w", encoding="utf-8", opener=without_links) as file:
        file.write(json.dumps({"max_tokens": max_tokens}) + "\n")
    fsync(partial)
    os.replace(partial, run_dir / _ROW_CAP)
    fsync(run_dir)


def row_cap(run_dir: Path, least: int = 1) -> int | None:
    """What `cap_rows` left, None if it was never called. Raises RunError if the file holds no number from `least` on.

    least  tokens that a row must have room for
    """
    path = run_dir / _ROW_CAP
    if not path.is_file():
        return None
    try:
        cap = json.loads(path.read_text(encoding="utf-8"))["max_tokens"]
        if type(cap) is not int or cap < least:
            raise ValueError(f"{cap!r}, the longest sequence may have {least}")
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError, OSError) as error:
        raise RunError(f"{path} does not hold a number of tokens ({type(error).__name__}: {error}); remove it, and "
                       "rows have optim.max_tokens_per_rank until memory runs out again") from error
    return cap


def checkpoints_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"
