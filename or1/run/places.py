"""Checks of a run's folder, and of the names in it, before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path

_FILES = (
    "config.resolved.json",
    "metrics.jsonl",
    ".lock",
    "row_tokens.json",
    "tune.json",
    ".marks.json",
    ".metrics.sums",
    ".wandb.json",
    ".trackio.json",
    ".metrics.jsonl.partial",
    ".config.resolved.json.partial",
    ".marks.json.partial",
    ".metrics.sums.partial",
)
_FOLDERS = ("checkpoints", "rollouts", "weights", "tensorboard", "wandb")


def unreadable(path: str) -> str:
    """Return the reason why a path cannot be decoded, with the remedy; "" if it can."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return (
            f"{path!r} has letters that Python cannot read in this locale (its encoding of file names is "
            f"{sys.getfilesystemencoding()}); set PYTHONUTF8=1 or LANG=C.UTF-8, or choose another folder"
        )
    return ""


def unusable(run_dir: Path) -> str:
    """Return the reason why a folder cannot hold a run, with the remedy; "" if it can."""
    text = str(run_dir)
    if problem := unreadable(text):
        return f"run_dir: {problem}"
    try:
        for name in _FILES:
            if (run_dir / name).is_dir():
                return f"{run_dir / name} is a folder, and a run keeps a file there; remove or rename it"
        for name in _FOLDERS:
            if (run_dir / name).exists() and not (run_dir / name).is_dir():
                return f"{run_dir / name} is a file, and a run keeps a folder there; remove or rename it"
    except (OSError, ValueError) as error:
        return f"run_dir = {text!r} cannot hold a run ({error}); choose another, with --set run_dir=..."
    return ""
