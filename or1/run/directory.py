"""The run directory: creation, recorded settings, and checks before a resume."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from or1.config import Config
from or1.config.changes import changed_keys, described, fixed_keys
from or1.config.load import dump_config
from or1.core.errors import CheckpointError, OtherSettingsError, RunError
from or1.core.files import NO_ROOM, write_whole
from or1.magic.stages import record_of
from or1.run.checkpoint import read_manifest, step_folder, step_folders
from or1.run.marks import NAME as MARKS
from or1.run.marks import is_altered, lost_history, mark_record
from or1.run.metrics_log import read_metrics
from or1.run.places import unusable

RECORD = "config.resolved.json"
"""The settings of a run, in its folder."""
# Written when a step runs out of memory; the next start reads the file.
_ROW_CAP = "row_tokens.json"


def prepare_run_dir(config: Config, fresh: bool = False) -> list[str]:
    """Create the run directory and record the resolved config in it. Return messages for the user.

    A directory that contains a run is resumed. `fresh` moves that run aside instead; nothing is deleted.

    Raises RunError as `check_run_dir` and `require_movable` do, and if the folder cannot be created.
    """
    run_dir, messages = config.run_path, []
    try:
        if fresh and run_dir.is_dir():
            messages += _move_aside(run_dir)
        changed = check_run_dir(config)
        run_dir.mkdir(parents=True, exist_ok=True)
        # A local model is recorded by its absolute path, so that `or1 export` works from any folder.
        model = config.model.model_copy(update={"path": _whole_path(config.model.path)})
        text = dump_config(config.model_copy(update={"model": model}))
        messages += _remarks(run_dir, changed)
        mark_record(run_dir, text)
        write_whole(run_dir / RECORD, text)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise RunError(f"run_dir = {str(run_dir)!r} cannot hold a run ({error}); choose another folder") from error
    return messages + ([listed("continues with changed settings:", changed)] if changed else [])


def listed(head: str, lines: list[str]) -> str:
    """Return a message of a head and one indented line for each of `lines`."""
    return "\n    ".join([head, *lines])


def _remarks(run_dir: Path, changed: list[str]) -> list[str]:
    """Return remarks on a folder whose run is resumed: an altered record, or steps without any checkpoint."""
    remarks = []
    if changed and is_altered(run_dir, (run_dir / RECORD).read_bytes()):
        remarks.append(f"{run_dir / RECORD} was changed since the run wrote it; it is written anew from these settings")
    done = [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")]
    if done and max(done) > 0 and not step_folders(checkpoints_of(run_dir)):
        remarks.append(f"no checkpoint was committed in {max(done)} steps; the run begins again at step 0")
    return remarks


def require_movable(run_dir: Path) -> None:
    """Raise RunError if --fresh must not move the folder: it is the working folder, or does not contain a run."""
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    if Path.cwd().is_relative_to(run_dir.resolve()):
        raise RunError(
            f"run_dir = {str(run_dir)!r} is or contains the current working folder, so --fresh cannot move it aside; "
            "start from another folder, or choose one with --set run_dir=..."
        )
    if not any((run_dir / name).exists() for name in (RECORD, "metrics.jsonl", "checkpoints")):
        raise RunError(
            f"{run_dir} holds no run (it has no {RECORD}), so --fresh does not move it; choose another folder with "
            "--set run_dir=..., or omit --fresh to train in this folder beside its present files"
        )


def _move_aside(run_dir: Path) -> list[str]:
    require_movable(run_dir)
    if not any(run_dir.iterdir()):
        return []
    # If run_dir is a link, its target is moved and recreated, so that the new run stays on the disk the user chose.
    run_dir = run_dir.resolve()
    aside = run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    run_dir.rename(aside)
    run_dir.mkdir()
    return [f"moved the former run to {aside}"]


def check_run_dir(config: Config) -> list[str]:
    """Return a line "setting: old -> new" for each difference from the recorded run; a resumed run may change all.

    A run that trained nothing has nothing to resume, so any config is accepted.
    Raises OtherSettingsError if a differing setting must not change, and RunError if the folder is unusable or has lost
    its record or its checkpoints.
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
    if not recorded or not _has_begun(run_dir):
        return []
    recorded, settings = _comparable(recorded), _comparable(config.model_dump(mode="json"))
    changed = changed_keys(recorded, settings)
    done, begun = _stages_so_far(run_dir, steps)
    if fixed := fixed_keys(changed, done, begun, len(config.stage)):
        free = [key for key in changed if key not in fixed]
        lines = described(fixed, recorded, settings)
        lines += [f"{line} (may change)" for line in described(free, recorded, settings)]
        raise OtherSettingsError(_refusal(run_dir, fixed, lines))
    return described(changed, recorded, settings)


def holds_run(run_dir: Path) -> bool:
    """Return True if a run has begun in the folder, however little is left of the run."""
    return (run_dir / RECORD).exists() or _has_begun(run_dir)


def is_of_other(config: Config) -> bool:
    """Return True if the folder's run surely has other settings, even if the run is damaged.

    A run without a step may have begun a moment ago, in another process. It is another run if any setting differs.
    """
    try:
        recorded = _comparable(recorded_config(config.run_path))
    except (RunError, OSError):
        return False
    changed = changed_keys(recorded, _comparable(config.model_dump(mode="json")))
    return bool(fixed_keys(changed, 0, 0, len(config.stage)) if _has_begun(config.run_path) else changed)


def _has_begun(run_dir: Path) -> bool:
    return bool(step_folders(checkpoints_of(run_dir)) or read_metrics(run_dir / "metrics.jsonl"))


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that do not depend on the working folder: without run_dir, and with a whole model path."""
    found = {key: value for key, value in settings.items() if key != "run_dir"}
    if isinstance(model := found.get("model"), dict) and "path" in model:
        found["model"] = model | {"path": _whole_path(str(model["path"]))}
    return found


def _refusal(run_dir: Path, fixed: list[str], lines: list[str]) -> str:
    stages = altered = ""
    if any(key.startswith("stage.") for key in fixed):
        stages = (
            "; of a stage that has begun only steps, until, plateau_evals and plateau_gain may change, and only "
            "until it ends, or if it is the last"
        )
    if is_altered(run_dir, (run_dir / RECORD).read_bytes()):
        altered = (
            f" (its {RECORD} was changed since the run wrote it: put that file back, or remove it and repeat "
            "this command)"
        )
    head = f"{run_dir} holds a run with other settings ({', '.join(fixed)}){stages}{altered}:"
    return (
        f"{listed(head, lines)}\n"
        "Set the old values to resume that run, choose another folder with --set run_dir=..., or start anew with "
        "--fresh, which moves the old run aside"
    )


def _checkpoint_every(recorded: dict[str, Any], config: Config) -> int:
    found = recorded.get("checkpoint")
    every = found.get("every_steps") if isinstance(found, dict) else None
    return every if type(every) is int and every > 0 else config.checkpoint.every_steps


def _whole_path(model: str) -> str:
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _stages_so_far(run_dir: Path, steps: list[int]) -> tuple[int, int]:
    """Return the number of stages that have ended and that have begun, from the newest readable checkpoint."""
    for step in reversed(steps):
        try:
            state = read_manifest(step_folder(checkpoints_of(run_dir), step))["state"]
            stage = record_of(state["stages"])
            in_rollout = bool(state.get("in_flight"))
            return stage.index, stage.index + int(state["step"] > stage.began or in_rollout)
        except (CheckpointError, ValueError, TypeError, LookupError, AttributeError):
            continue
    return 0, 0


def all_stages_ended(run_dir: Path, step: int, stages: int) -> bool:
    """Return True if the newest checkpoint is that of `step`, and all `stages` of the run had ended there."""
    steps = step_folders(checkpoints_of(run_dir))
    return steps[-1:] == [step] and _stages_so_far(run_dir, steps)[0] >= stages


def recorded_config(run_dir: Path) -> dict[str, Any]:
    """Return the recorded settings of a run, not validated. Raises RunError if they are missing or unreadable."""
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
    """Raise RunError if the recorded settings were changed since the run wrote them."""
    if is_altered(run_dir, (run_dir / RECORD).read_bytes()):
        raise RunError(
            f"{run_dir / RECORD} was changed since the run wrote it; put it back as it was, or remove it and repeat "
            f"the `or1 train` command that began the run. If you meant to change it, remove {run_dir / MARKS}"
        )


def recorded_run(run_dir: Path) -> Config:
    """Return the recorded config of a run. Raises RunError if it is missing, altered, or invalid in this version."""
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
    """Limit the packed rows of the next start to `max_tokens`, whatever its checkpoint records."""
    # Several ranks may call this at once.
    write_whole(run_dir / _ROW_CAP, json.dumps({"max_tokens": max_tokens}) + "\n", shared=True)


def row_cap(run_dir: Path, least: int = 1) -> int | None:
    """Return the limit that `cap_rows` recorded, None if there is none.

    least  tokens that a row must be able to hold

    Raises RunError if the file does not contain an integer of at least `least`.
    """
    path = run_dir / _ROW_CAP
    if not path.is_file():
        return None
    try:
        cap = json.loads(path.read_text(encoding="utf-8"))["max_tokens"]
        if type(cap) is not int or cap < least:
            raise ValueError(f"{cap!r}, but the longest sequence may have {least}")
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError, OSError) as error:
        raise RunError(
            f"{path} does not hold a number of tokens ({type(error).__name__}: {error}); remove it, and rows have "
            "optim.max_tokens_per_rank tokens until memory runs out again"
        ) from error
    return cap


def checkpoints_of(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"
