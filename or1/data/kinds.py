"""Recognition of unsupported file formats by their first bytes.

A single error for the file then replaces an error for each of its rows.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_LE

from or1.data.tables import separator_of

HEAD_BYTES = 4096
"""Number of first bytes of a file that `foreign_kind` needs."""

_READS = "or1 reads JSONL, one JSON array, parquet, CSV or TSV"
_ARROW = f"{_READS}; convert the file, for example with datasets: Dataset.from_file(FILE).to_parquet(NEW)"
_UTF16 = f"{_READS} in UTF-8; convert the file with iconv -f UTF-16 -t UTF-8"
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a pointer of git-lfs; the file itself was not fetched", "fetch it with git lfs pull"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it with gunzip"),
    (b"BZh", "compressed with bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "compressed with xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with unzstd"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it with unlz4"),
    (b"PK\x03\x04", "a zip archive or a workbook of Excel", f"unpack or export it; {_READS}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"unpack it; {_READS}"),
    (
        b"ARROW1",
        "an Arrow or Feather file",
        f"{_READS}; convert the file, for example with pandas: pandas.read_feather(FILE).to_parquet(NEW)",
    ),
    (b"\xff\xff\xff\xff", "an Arrow stream", _ARROW),
    (b"FEA1", "a Feather file of version 1", f"{_READS}; convert the file with pyarrow.feather.read_table"),
    (b"SQLite format 3\0", "an SQLite database", f"{_READS}; export the table"),
    (b"\x89HDF", "an HDF5 file", f"{_READS}; convert the file"),
    (b"%PDF", "a PDF document", _READS),
    (BOM_UTF32_LE, "UTF-32 text", _UTF16.replace("16", "32")),
    (BOM_UTF16_LE, "UTF-16 text", _UTF16),
    (BOM_UTF16_BE, "UTF-16 text", _UTF16),
    *((start, "UTF-16 text", _UTF16) for start in (b"{\0", b"[\0", b"\0{", b"\0[")),
)
_MARKUP = re.compile(rb"\s*<[!?a-zA-Z]")
# An object that starts in the first line and continues in the second, with a key or with the first row of {"data": [
_PRETTY = re.compile(rb"\s*\{[^\n]{0,999}\n\s*\"|\s*\{[^\n]{0,999}\[[ \t\r]*\n(?:[ \t]+[{\]]|\{[^\n]*,[ \t\r]*\n)")
_CELL = re.compile(rb"\s*\"?[A-Za-z_][\w .-]{0,60}\"?\s*")
_SEPARATORS = {b",": "CSV", b"\t": "TSV", b";": "CSV"}


def foreign_kind(path: str, head: bytes) -> str | None:
    """Return the name of an unsupported format and the remedy, as the end of a sentence; None for any other file.

    head  the first HEAD_BYTES of the file
    """
    for start, what, remedy in _STARTS:
        if head.startswith(start):
            return f"is {what}; {remedy}"
    if head[257:262] == b"ustar":
        return f"is a tar archive; unpack it; {_READS}"
    head = head.removeprefix(BOM_UTF8)
    if _MARKUP.match(head):
        return (
            "is HTML or XML, mostly a web page saved in place of the file; download the file itself "
            f"(of a hub the /resolve/ address, not /blob/); {_READS}"
        )
    if head.startswith(b"PAR1") or path.endswith(".parquet"):
        return None
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    if _PRETTY.match(head) and lines[0] != lines[0].rstrip(b"{[,:"):
        return (
            f"is pretty-printed JSON, an object over several lines; {_READS}: "
            "write one object a line (jq -c), or all objects as one array"
        )
    return _table_kind(path, lines)


def _table_kind(path: str, lines: list[bytes]) -> str | None:
    """Recognise a table in a file of another ending by a first line that consists of column names only."""
    if not lines or any(line.startswith((b"{", b"[")) for line in lines) or separator_of(path):
        return None
    kind = _kind_of_header(lines[0])
    return None if kind is None else f"is {kind}, but its name does not end in .{kind.lower()}; rename the file"


def _kind_of_header(line: bytes) -> str | None:
    for separator, kind in _SEPARATORS.items():
        if separator in line and all(map(_CELL.fullmatch, line.split(separator))):
            return kind
    return None
