"""Data that a setting names: a file, a folder of files, a pattern, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from or1.config.section import FilePaths, each_of

ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
"""Endings of the files that are read from a folder. Folders in a folder need a pattern, such as data/**/*.parquet."""
_SCHEMA = ".schema.json"  # `or1 init` writes one beside its config, and so into a folder that may be named as data
HUB = "hf:"
"""Start of the name of a dataset on the hub."""
# A commit ends at the first slash. The name of a branch may contain one, so there the last slash decides.
_DATASET = re.compile(r"([\w.-]+/[\w.-]+)(?:@([0-9a-f]{40}|[\w./-]+))?(?::([\w.-]+/)?([\w.-]+)|/([^:@\s]+))")


class Dataset(NamedTuple):
    """A split of a dataset on the hub, or one file of its repository.

    repo      owner/name
    revision  branch, tag or commit; None: the newest
    config    name of the subset
    split     name of the split, "" if `file` is set
    file      path of a file in the repository, "" if `split` is set
    """

    repo: str
    revision: str | None
    config: str
    split: str
    file: str


def dataset_of(name: str) -> Dataset | None:
    """Return the parts of a dataset's name; None if the name is malformed.

    name  hf:OWNER/NAME[@REVISION]:[CONFIG/]SPLIT or hf:OWNER/NAME[@REVISION]/FILE
    """
    found = _DATASET.fullmatch(name.removeprefix(HUB))
    if not name.startswith(HUB) or found is None:
        return None
    repo, revision, config, split, file = found.groups(default="")
    return Dataset(repo, revision or None, config.rstrip("/") or "default", split, file)


def expanded(paths: FilePaths, places: Sequence[Path]) -> FilePaths:
    """Return the paths with folders and patterns replaced by the names of their files, in the order of their names.

    places  folders that a relative path is searched in after the working directory

    A dataset's name and a path that names nothing stay unchanged. One path that names one file stays one path.
    """
    found = tuple(file for path in each_of(paths) for file in _files(path, places))
    return found[0] if isinstance(paths, str) and len(found) == 1 else found


def _files(path: str, places: Sequence[Path]) -> Iterator[str]:
    """Yield the files that one path names."""
    if path.startswith(HUB):
        yield path
        return
    options = [path] if Path(path).is_absolute() else [path, *(str(place / path) for place in places)]
    for option in options:
        if found := _matches(option):
            yield from found
            return
    yield path


def _matches(path: str) -> list[str]:
    try:
        if Path(path).is_file():
            return [path]
        if Path(path).is_dir():
            files = _visible(f"{glob.escape(path)}/*")
            return [name for name in files if name.endswith(ENDINGS) and not name.endswith(_SCHEMA)]
        return _visible(path) if glob.has_magic(path) else []
    except (OSError, ValueError, re.error):
        return []


def _visible(pattern: str) -> list[str]:
    """Return the files that match a pattern, sorted. glob leaves out names that begin with a dot."""
    return sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
