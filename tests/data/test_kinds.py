"""Files that or1 does not read: one clear error each, and never one for each of their rows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from or1.config import Config
from or1.config.rules import contradictions
from or1.data import DataError, PromptSet, load_prompts

ROW = {"question": "1+1=", "answer": "2"}


def load(path: Path) -> PromptSet:
    return load_prompts([path], None, max_prompt_tokens=100, max_bad_fraction=1.0)


CSV = b"question,answer\n1+1=,2\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ARROW = b"ARROW1\0\0" + bytes(100)
JSONL = b'{"question": "1+1=", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl.gz", gzip.compress(JSONL, mtime=0), "is compressed with gzip; unpack it with gunzip"),
        ("x.jsonl", gzip.compress(JSONL * 5000, mtime=0), "is compressed with gzip; unpack it with gunzip"),
        ("x.jsonl.bz2", bz2.compress(JSONL), "is compressed with bzip2; unpack it with bunzip2"),
        ("x.jsonl.xz", lzma.compress(JSONL), "is compressed with xz; unpack it with unxz"),
        ("x.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(99), "is compressed with zstd; unpack it with unzstd"),
        ("x.arrow", ARROW, "is an Arrow or Feather file; .*parquet"),
        ("x.arrow", b"\xff\xff\xff\xff" + bytes(99), "is an Arrow stream; .*to_parquet"),
        ("x.xlsx", b"PK\x03\x04" + bytes(99), "is a zip archive or a workbook of Excel; "),
        ("x.jsonl", JSONL.decode().encode("utf-16"), "is UTF-16 text; .* iconv -f UTF-16 -t UTF-8"),
        ("x.jsonl", JSONL.decode().encode("utf-16-le"), "is UTF-16 text; "),
        ("x.jsonl", JSONL.decode().encode("utf-16-be"), "is UTF-16 text; "),
        ("x.jsonl", JSONL.decode().encode("utf-32"), "is UTF-32 text; .* -f UTF-32 -t UTF-8"),
        ("x.txt", CSV, "is CSV, but its name does not end in .csv; rename the file"),
        ("x.txt", b'"question"\t"answer"\n1\t2\n', "is TSV, but its name does not end in .tsv; rename the file"),
        ("x.csv", CSV.replace(b",", b";"), "its values are separated by semicolons; write the file with commas"),
        ("x.csv", b"question,question\n1,2\n", "column 'question' appears twice in the first line; rename one"),
        ("x.csv", b'question,answer\n"1+1=,2\n', "is not a whole table after 0 rows .*; write it anew"),
        ("x.csv", "question,answer\nd\u00e9j\u00e0,2\n".encode("latin-1"), "is not UTF-8 at byte 17; convert the file"),
        ("x.csv", b"1+1=,2\n", "has no rows; remove it from the data or fill it"),
        ("x.parquet", POINTER, "is a pointer of git-lfs; .* git lfs pull"),
        ("x.jsonl", POINTER, "is a pointer of git-lfs; .* git lfs pull"),
        ("x.json", json.dumps(ROW, indent=2).encode(), "is pretty-printed JSON, an object over several lines; "),
        ("x.jsonl", b"\xef\xbb\xbf" + json.dumps(ROW, indent=0).encode() * 2, "is pretty-printed JSON, "),
        ("x.json", b'{"data": [\n  {"question": "1+1=", "answer": "2"}\n]}', "is pretty-printed JSON, "),
        ("x.json", json.dumps({"data": [ROW] * 3}, indent=4).encode(), "is pretty-printed JSON, "),
        ("x.parquet", b"<!DOCTYPE html>\n<html>", "is HTML or XML, .* /resolve/"),
        ("x.jsonl", b"\n<html><body>404</body>", "is HTML or XML, "),
    ],
)
def test_a_file_of_another_kind_is_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^[^\n]*{re.escape(name)}: {message}[^\n]*$"):
        load(path)


@pytest.mark.parametrize(
    "first", [b"see, below", b"{", b'{"question": "1+1=",', b'{"question": [', b"", b"x\0y", b"question,answer"]
)
def test_a_broken_first_line_is_still_a_broken_line(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(first + b"\n" + JSONL * 3)
    assert len(load(path).prompts) == 3


def test_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; name the files in it"):
        load(tmp_path)


def problems(path: str) -> list[str]:
    config = Config(run_dir="run", model={"path": "m"}, data={"train": path})
    return [problem.message for problem in contradictions(config, "filter") if problem.path.startswith("data.train")]


def test_a_folder_or_a_pattern_without_files_is_named(tmp_path: Path) -> None:
    assert problems(str(tmp_path))[0].startswith(f"{str(tmp_path)!r} is a folder without data files (.jsonl, .json, ")
    pattern = str(tmp_path / "*.jsonl")
    assert problems(pattern)[0].startswith(f"no file matches the pattern {pattern!r} (looked in ")
    odd = tmp_path / "x[1].jsonl"
    odd.write_bytes(JSONL)
    assert problems(str(odd)) == [] and len(load(odd).prompts) == 1
    assert problems("hf:openai/gsm8k:main/train") == [] and problems("hf:openai/gsm8k/main/train.jsonl") == []
    assert "is not the name of a dataset; write hf:OWNER/NAME:CONFIG/SPLIT" in problems("hf:gsm8k")[0]
