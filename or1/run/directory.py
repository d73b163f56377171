"""What survives a crash, and the run directory that holds it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from or1.config import Config
from or1.config.changes import changed_keys, described, fixed_keys
from or1.config.load import dump_config
from or1.core.errors import CheckpointError, RunError
from or1.core.files import NO_ROOM, fsync, without_links, write_whole
from or1.magic.stages import record_of
from or1.run.checkpoint import read_manifest, step_folder, step_folders
from or1.run.marks import NAME as MARKS
from or1.run.marks import is_altered, lost_history, mark_record
from or1.run.metrics_log import read_metrics
from or1.run.places import unusable

if TYPE_CHECKING:
    pass

RECORD = "config.resolved.json"
"""The settings of a run, in its folder."""
# Left by a run that ended out of memory.
_ROW_CAP = "row_tokens.json"


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
        raise RunError(
            f"run_dir = {str(run_dir)!r} is the folder that this command runs in, or holds it, so --fresh "
            "cannot move it aside; start from another folder, or choose one with --set run_dir=..."
        )
    if not any((run_dir / name).exists() for name in (RECORD, "metrics.jsonl", "checkpoints")):
        raise RunError(
            f"{run_dir} holds no run (it has no {RECORD}), so --fresh leaves it where it is; choose another "
            "folder with --set run_dir=..., or train beside what is there, without --fresh"
        )


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
        stages = (
            (
                "; of a stage that has begun only steps, until, plateau_evals and plateau_gain may change, and only "
                "until it ends, or if it is the last"
            )
            if any(key.startswith("stage.") for key in fixed)
            else ""
        )
        altered = (
            (
                f" (its {RECORD} was changed since the run wrote it: put that file back, or remove it and repeat "
                "this command)"
            )
            if is_altered(run_dir, (run_dir / RECORD).read_bytes())
            else ""
        )
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
            stage = record_of(state["stages"])
            return stage.index, stage.index + (state["step"] > stage.began)
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
        raise RunError(
            f"{path} does not hold a number of tokens ({type(error).__name__}: {error}); remove it, and "
            "rows have optim.max_tokens_per_rank until memory runs out again"
        ) from error
    return cap


def checkpoints_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"
