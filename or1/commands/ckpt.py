"""`or1 ckpt ls|verify|prune`: the checkpoints of a run."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from or1.commands.arguments import positive
from or1.core.errors import CheckpointError, RunError
from or1.core.text import visible
from or1.report.console import default_console

if TYPE_CHECKING:
    from rich.console import Console

    from or1.run.keeping import Keeping

_ACTIONS = {
    "ls": "list them",
    "verify": "read every file and compare its sha256",
    "prune": "keep the newest that verify, and those that the run keeps for good; remove the others",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `or1 ckpt`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(_ACTIONS))
    for name, text in _ACTIONS.items():
        action = actions.add_parser(name, help=text)
        action.add_argument("run_dir", type=Path, help="run directory")
        if name == "verify":
            action.add_argument("--step", type=positive, help="this one only")
        if name == "prune":
            action.add_argument("--keep", type=positive, required=True, metavar="N", help="how many to keep")


def run(arguments: argparse.Namespace) -> int:
    """List, verify or remove checkpoints. Raises RunError, CheckpointError."""
    match arguments.action:
        case "ls":
            list_checkpoints(arguments.run_dir)
        case "verify":
            verify_checkpoints(arguments.run_dir, arguments.step)
        case _:
            prune_checkpoints(arguments.run_dir, arguments.keep)
    return 0


def list_checkpoints(run_dir: Path, console: Console | None = None) -> None:
    """Print a line per committed checkpoint, with why it is kept. Raises RunError if there is none."""
    from rich.table import Table
    from rich.text import Text

    from or1.run.checkpoint import MANIFEST, read_manifest, step_folder

    folder, steps = _found(run_dir)
    table = Table("step", "written", "ranks", "files", "bytes", "kept", "problem", box=None, pad_edge=False)
    keeping = _keeping(run_dir)
    for step in steps:
        path = step_folder(folder, step)
        shown = path / MANIFEST if (path / MANIFEST).is_file() else path
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(shown.lstat().st_mtime))
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            table.add_row(str(step), written, "", "", "", "", Text(visible(error)))
            continue
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        ranks = visible(manifest.get("world_size", "?"))
        newest = f"newest {keeping.newest}" if step in steps[-keeping.newest :] else ""
        why = ", ".join(filter(None, (newest, keeping.for_good(folder, step))))
        table.add_row(str(step), written, Text(ranks), str(len(manifest["files"])), f"{size:,}", why, "")
    (console or default_console()).print(table)


def verify_checkpoints(run_dir: Path, step: int | None) -> None:
    """Read every file of one checkpoint, or of all if `step` is None.

    Raises CheckpointError that names each missing or altered file, RunError if there is no such checkpoint.
    """
    from or1.run.checkpoint import step_folder, verify_checkpoint
    from or1.run.marks import lost_newest

    folder, steps = _found(run_dir)
    if step is not None and step not in steps:
        raise RunError(f"{run_dir} has no checkpoint of step {step}; it has {steps}")
    problems = []
    if step is None and (lost := lost_newest(run_dir)):
        problems.append(CheckpointError(lost))
    for chosen in steps if step is None else [step]:
        try:
            manifest = verify_checkpoint(step_folder(folder, chosen))
        except CheckpointError as error:
            problems.append(error)
        else:
            print(f"step {chosen}: {len(manifest['files'])} files verify")
    if problems:
        remedy = (
            "restore the damaged files, or remove the folder; the run resumes from the newest checkpoint that verifies"
        )
        raise type(problems[0])("\n".join([*map(str, problems), remedy]))


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Remove checkpoints older than the newest `keep` that verify. Newer ones that do not verify stay.

    So do those that the run keeps for good (checkpoint.keep_stage_ends, checkpoint.keep_every).

    Raises CheckpointError, with nothing removed, if fewer than `keep` verify and some do not.
    """
    from or1.run.checkpoint import remove_step, step_folder, verify_checkpoint

    folder, steps = _found(run_dir)
    good: list[int] = []
    problems: list[CheckpointError] = []
    for step in reversed(steps):
        if len(good) == keep:
            break
        try:
            verify_checkpoint(step_folder(folder, step))
            good.append(step)
        except CheckpointError as error:
            problems.append(error)
    if problems and len(good) < keep:
        listed = "\n".join(map(str, problems))
        raise CheckpointError(f"only {len(good)} of {len(steps)} checkpoints verify, so none is removed:\n{listed}")
    keeping = _keeping(run_dir)
    for step in [s for s in steps if s < min(good)]:
        if why := keeping.for_good(folder, step):
            print(f"step {step} stays: {why}")
            continue
        remove_step(folder, step)
        print(f"removed step {step}")
    print(f"kept {', '.join(map(str, sorted(good)))}")


def _keeping(run_dir: Path) -> Keeping:
    """Return which checkpoints the run keeps; the newest alone if its settings cannot be read."""
    from pydantic import ValidationError

    from or1.config import CheckpointConfig
    from or1.run.directory import recorded_config
    from or1.run.keeping import Keeping

    try:
        return Keeping.of(CheckpointConfig.model_validate(recorded_config(run_dir).get("checkpoint", {})))
    except (RunError, ValidationError):
        return Keeping.of(CheckpointConfig())


def _found(run_dir: Path) -> tuple[Path, list[int]]:
    """Return the folder of checkpoints and their steps, ascending. Raise RunError if there is no checkpoint."""
    from or1.run.checkpoint import step_folders
    from or1.run.directory import checkpoints_of
    from or1.run.marks import lost_newest

    folder = checkpoints_of(run_dir)
    steps = step_folders(folder)
    if not steps and (lost := lost_newest(run_dir)):
        raise RunError(lost)
    if not steps:
        raise RunError(f"{run_dir} has no committed checkpoint; name a run directory")
    return folder, steps
