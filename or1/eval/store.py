"""Rows in parts, each committed by rename: a process that is killed at any instant repeats only the current part."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from or1.core.errors import StoreError
from or1.core.files import SEAL, is_unbroken, replacing, sealed, write_whole

_PART = b"or1.part"


class PartStore:
    """A folder with settings.json and part_NNNNNN.parquet, whose parts are finally merged into the file `final`.

    settings  what the rows depend on; a folder made under other settings is refused
    size      problems per part of a new store; a resumed store keeps its own size, so that part numbers stay valid

    Raises StoreError for a folder made under other settings.
    """

    def __init__(self, folder: Path, final: Path, settings: Mapping[str, Any], schema: pa.Schema, size: int):
        self.folder, self.final, self.schema, self.size = folder, final, schema, size
        self._settings = dict(settings)
        self._merged = False
        if self._record.is_file():
            self._resume(self._read_record())
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_record()
        for path in folder.glob("*.partial"):
            path.unlink()
        self._done = {index for index in self._numbers() if self._is_whole(index)}

    def __contains__(self, index: int) -> bool:
        return self._merged or index in self._done

    def write(self, index: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Commit the rows of part `index`."""
        path = self._path(index)
        table = pa.Table.from_pylist(list(rows), schema=self.schema).replace_schema_metadata({_PART: str(index)})
        with replacing(path) as partial:
            pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
        self._done.add(index)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the parts in order, with the given columns or all."""
        wanted = None if columns is None else list(columns)
        if self._merged:
            yield from self._merged_tables(wanted)
            return
        for index in sorted(self._done):
            yield pq.read_table(self._path(index), columns=wanted, page_checksum_verification=True)

    def _merged_tables(self, columns: list[str] | None) -> Iterator[pa.Table]:
        try:
            with pq.ParquetFile(self.final, page_checksum_verification=True) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns=columns)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise StoreError(
                f"{self.final} cannot be read ({type(error).__name__}: {error}); restore it, or remove "
                "it to sample its rows again"
            ) from error

    def merge(self) -> None:
        """Write all rows to `final`, one row group a part, commit the file by rename, and remove the parts."""
        if self._merged:
            return
        self.final.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(self.final) as partial,
            pq.ParquetWriter(partial, self.schema, compression="zstd", write_page_checksum=True) as writer,
        ):
            for table in self.tables():
                writer.write_table(table.replace_schema_metadata(None))
        self._merged = True
        self._write_record()
        self._remove_parts()

    @property
    def _record(self) -> Path:
        return self.folder / "settings.json"

    def _read_record(self) -> dict[str, Any]:
        try:
            before = json.loads(self._record.read_text(encoding="utf-8"))
            if not is_unbroken(before):
                raise ValueError("it was altered")
            if not isinstance(before["part_size"], int) or not isinstance(before["merged"], bool):
                raise ValueError("part_size or merged is missing")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise StoreError(
                f"{self._record} does not describe its parts ({type(error).__name__}: {error}); "
                "start again with --fresh, which moves the parts aside"
            ) from error
        return before

    def _write_record(self) -> None:
        own = {"part_size": self.size, "merged": self._merged}
        write_whole(self._record, json.dumps(sealed({**self._settings, **own}), indent=1))

    def _resume(self, before: dict[str, Any]) -> None:
        self.size, merged = before.pop("part_size"), before.pop("merged")
        before.pop(SEAL, None)
        changed = [key for key in sorted(before | self._settings) if before.get(key) != self._settings.get(key)]
        if changed:
            raise StoreError(
                f"{self.folder} holds results made under other settings ({', '.join(changed)}); choose "
                "another folder with --out, or start again with --fresh, which moves the results aside"
            )
        self._merged = merged and self.final.is_file()
        if self._merged:
            self._remove_parts()

    def _remove_parts(self) -> None:
        for index in self._numbers():
            self._path(index).unlink()
        self._done = set()

    def _path(self, index: int) -> Path:
        return self.folder / f"part_{index:06d}.parquet"

    def _numbers(self) -> list[int]:
        found = (re.fullmatch(r"part_([0-9]{6,})\.parquet", path.name) for path in self.folder.iterdir())
        return [int(match[1]) for match in found if match]

    def _is_whole(self, index: int) -> bool:
        """Return True if part `index` can be read and belongs to that index; otherwise delete the part.

        A power cut may leave a damaged part, which is then sampled again.
        """
        path = self._path(index)
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            part = (table.schema.metadata or {}).get(_PART, str(index).encode())
            if table.schema.equals(self.schema) and part == str(index).encode():
                return True
        except (pa.ArrowException, OSError, ValueError, KeyError):
            pass
        path.unlink()
        return False


def move_aside(path: Path) -> str | None:
    """Rename an earlier result with a time stamp, and return a message; return None if there is no earlier result."""
    if not path.exists():
        return None
    aside = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    shutil.move(path, aside)
    return f"moved the former results to {aside}"
