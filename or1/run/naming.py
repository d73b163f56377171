"""The folder of a run whose config does not name one folder: the newest run that can be resumed, or a new folder."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from or1.config import Config
from or1.config.root import TIME
from or1.core.errors import OtherSettingsError, RunError
from or1.run.directory import check_run_dir, holds_run, is_of_other

_STAMP = r"(\d{8}-\d{6})(?:-(\d+))?"


class Named(NamedTuple):
    """A config whose run_dir is one folder, and a line for the user; the line is empty if the config named a folder."""

    config: Config
    line: str = ""


def named(config: Config, fresh: bool = False, claim: bool = False) -> Named:
    """Return the config with `{time}` in run_dir filled in.

    fresh  always choose a new folder
    claim  make the new folder, so that a command of the same second chooses another; False: nothing is written

    The newest folder of the same name whose run these settings can resume is chosen, finished or not, so that the same
    command resumes. Runs with other settings are left alone. Raises RunError for a damaged run, which might be the one
    to resume, and for a rank of a launcher: ranks that start at different times would choose different folders.
    """
    if TIME not in config.run_dir:
        return Named(config)
    if "RANK" in os.environ:
        raise RunError(
            f"run_dir = {config.run_dir!r} is chosen by the time, and the ranks of torchrun would choose several; "
            "add --set run_dir=FOLDER, or start the ranks with --nproc"
        )
    found = [] if fresh else [folder for folder in _folders(config.run_dir) if holds_run(folder.path)]
    for folder in sorted(found, reverse=True):
        chosen = config.model_copy(update={"run_dir": str(folder.path)})
        if is_of_other(chosen):
            continue
        try:
            check_run_dir(chosen)
        except OtherSettingsError:
            continue
        except RunError as error:
            raise RunError(f"{error}. --fresh starts in a new folder") from error
        return Named(chosen, f"run_dir = {chosen.run_dir}: resumes; --fresh starts in a new folder")
    chosen = config.model_copy(update={"run_dir": _new(config.run_dir, claim)})
    others = f"; {len(found)} earlier with other settings" if found else ""
    return Named(chosen, f"run_dir = {chosen.run_dir}: new{others}")


class _Folder(NamedTuple):
    stamp: str
    repeat: int
    path: Path


def _folders(template: str) -> Iterator[_Folder]:
    place = Path(template)
    before, _, after = place.name.partition(TIME)
    pattern = re.compile(f"{re.escape(before)}{_STAMP}{re.escape(after)}", re.ASCII)
    for each in place.parent.iterdir() if place.parent.is_dir() else ():
        if (match := pattern.fullmatch(each.name)) and each.is_dir():
            yield _Folder(match[1], int(match[2] or 0), each)


def _new(template: str, claim: bool) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for repeat in range(10**6):
        name = template.replace(TIME, f"{stamp}-{repeat}" if repeat else stamp)
        if Path(name).exists():
            continue
        try:
            if claim:
                Path(name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # The run makes its folder too, and explains why that fails.
        return name
    raise RunError(f"run_dir = {template!r} has no name left for this second; repeat the command")
