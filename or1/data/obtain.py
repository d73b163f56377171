"""Files of a published dataset in a folder, with a manifest that later calls verify.

The manifest NAME.manifest has an entry a file, {"sources", "commits", "from", "rows", "sha256", "bytes"}. It has no
ending that or1 takes for data, so the folder itself can be named as data.train.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from or1.config.data_paths import HUB
from or1.config.published import Made, Published
from or1.core.errors import DataError, RowError
from or1.core.files import file_entry, is_unbroken, replacing, sealed, without_links, write_whole
from or1.data.hub import files_of
from or1.data.rows import read_rows

_HASH = re.compile(r"[0-9a-f]{64}")
_TIMEOUT_S = 60.0

Entry = dict[str, Any]


class Got(NamedTuple):
    """One file in the folder: its path, its manifest entry, and whether this call wrote it or verified it."""

    path: Path
    entry: Entry
    is_new: bool


def obtain(name: str, published: Published, folder: Path, done: Callable[[Got], None]) -> None:
    """Write the files of a dataset that are missing, verify the others, and call `done` with each.

    A call that was interrupted continues: finished files are kept, and the hub's cache keeps parts of a download. A
    file that is written again comes from the commit in the manifest.

    Raises DataError: no network, a file that differs from the manifest, or another number of rows than published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / f"{name}.manifest"
    entries = _read_manifest(manifest)
    for made in published.files:
        path = folder / made.file
        entry = entries.get(made.file)
        if entry is not None and path.exists():
            _verify(path, entry)
            done(Got(path, entry, is_new=False))
            continue
        entry = entries[made.file] = _make(path, made, entry)
        write_whole(manifest, json.dumps(sealed({"name": name, "files": entries}), indent=2) + "\n")
        done(Got(path, entry, is_new=True))


def _read_manifest(path: Path) -> dict[str, Entry]:
    try:
        data = json.loads(path.read_bytes())
        if is_unbroken(data):
            return dict(data["files"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{path}: is damaged; remove the manifest and its files to download them again")


def _verify(path: Path, entry: Entry) -> None:
    """Raise DataError if a file is not the one that was written."""
    found = file_entry(path)
    if found["sha256"] != entry["sha256"]:
        raise DataError(
            f"{path}: differs from what was downloaded ({found['bytes']:,} bytes with sha256 {found['sha256']}, the "
            f"manifest has {entry['bytes']:,} bytes with {entry['sha256']}); remove the file to download it again"
        )


def _make(path: Path, made: Made, before: Entry | None) -> Entry:
    """Write one file and return its manifest entry.

    before  entry of the manifest for a file that is gone, whose commits and sources must come again
    """
    with replacing(path) as partial:
        parts = _parts(path, made, before)
        origins = [{"name": part.name, **file_entry(part)} for part in parts]
        if before is not None and before["from"] != origins:
            raise DataError(
                f"{path}: its source differs from the one in the manifest; remove the manifest to take the new one"
            )
        rows = _write(partial, made, parts)
        for part in parts:
            if part.parent == path.parent:
                part.unlink()
        entry = {
            "sources": list(made.sources),
            "commits": [_commit_of(part) for part in parts] if before is None else before["commits"],
            "from": origins,
            "rows": rows,
            **file_entry(partial),
        }
        _check(path, made, entry)
    return entry


def _check(path: Path, made: Made, entry: Entry) -> None:
    """Raise DataError unless a new file has the published rows and hash, and is the file at its path, if any."""
    if made.rows is not None and entry["rows"] != made.rows:
        raise DataError(f"{path}: has {entry['rows']:,} rows, and {made.rows:,} are published; the source has changed")
    if made.sha256 and entry["sha256"] != made.sha256:
        raise DataError(
            f"{path}: has sha256 {entry['sha256']}, and {made.sha256} is published; try again, or look at what "
            "answers instead of the source"
        )
    # A file without an entry: left by a call that was killed between file and manifest, or a file of the user.
    if path.exists() and file_entry(path)["sha256"] != entry["sha256"]:
        raise DataError(f"{path}: is there already, with other content; move it away, or choose another --out")


def _parts(path: Path, made: Made, before: Entry | None) -> list[Path]:
    """Return the local files that a file is made of, in order."""
    found: list[Path] = []
    for source in made.sources:
        if source.startswith(HUB):
            found += [_checked(Path(file)) for file in files_of(_pinned(source, before))]
        else:
            found.append(_from_web(source, path.with_name(f".{path.name}.source")))
    return found


def _pinned(source: str, before: Entry | None) -> str:
    """Return the name of a hub's split with the commit that the first download recorded, if there was one."""
    if before is None or "@" in source:
        return source
    repo, _, split = source.removeprefix(HUB).partition(":")
    return f"{HUB}{repo}@{before['commits'][0]}:{split}"


def _checked(file: Path) -> Path:
    """Return a file of the hub's cache. Raises DataError if its content differs from the hash that is its name."""
    blob = Path(os.path.realpath(file))
    if _HASH.fullmatch(blob.name) and file_entry(blob)["sha256"] != blob.name:
        raise DataError(f"{blob}: differs from the hub's sha256, which is its name; remove it and start again")
    return file


def _commit_of(file: Path) -> str:
    """Return the commit of a file in the hub's cache, .../snapshots/COMMIT/...; "" for another file."""
    parts = file.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


def _from_web(url: str, path: Path) -> Path:
    """Download one small file to `path`. Raises DataError, in one line."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, open(path, "wb", opener=without_links) as file:
            shutil.copyfileobj(answer, file)
    except urllib.error.HTTPError as error:
        raise DataError(f"{url}: cannot be downloaded (status {error.code}); try again later") from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"{url}: cannot be reached ({reason}); start with network, or set https_proxy") from error
    return path


def _write(partial: Path, made: Made, parts: Sequence[Path]) -> int:
    """Write the rows of all parts to `partial` and return their number."""
    ending = Path(made.file).suffix
    if ending == ".parquet":
        return _write_parquet(partial, parts)
    rows = _rows(made, parts)
    with open(partial, "w", encoding="utf-8", opener=without_links) as file:
        # The first row without a comma in front of it; json.dumps writes ASCII, as the authors of GSM8K do.
        start, between, end = ("[\n", ",\n", "\n]\n") if ending == ".json" else ("", "\n", "\n")
        count = 0
        for row in rows:
            file.write(between if count else start)
            file.write(json.dumps(row))
            count += 1
        file.write(end if count else "")
    return count


def _rows(made: Made, parts: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all parts that the file keeps. Raises DataError for a broken row."""
    for part in parts:
        for number, row in read_rows(str(part)):
            if isinstance(row, RowError):
                raise DataError(f"{part}:{number}: {row}; the source has changed")
            if made.dates is None or made.dates[0] <= str(row.get("contest_date"))[:10] <= made.dates[1]:
                yield row


def _write_parquet(partial: Path, parts: Sequence[Path]) -> int:
    """Copy one parquet file as it is, or write several as one, row group by row group; return the rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        if len(parts) == 1:
            shutil.copyfile(parts[0], partial)
            return int(pyarrow.parquet.ParquetFile(partial).metadata.num_rows)
        schema = pyarrow.parquet.ParquetFile(parts[0]).schema_arrow
        count = 0
        with pyarrow.parquet.ParquetWriter(partial, schema) as writer:
            for part in parts:
                for batch in pyarrow.parquet.ParquetFile(part).iter_batches(batch_size=1024):
                    writer.write_batch(batch)
                    count += batch.num_rows
        return count
    except pyarrow.ArrowException as error:
        cause = str(error).partition("\n")[0]
        raise DataError(f"{parts[0]}: is not a whole parquet file ({cause}); remove it and start again") from error
