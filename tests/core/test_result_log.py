"""A log of results: values survive, damaged ends are dropped, and other settings or a second writer are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from or1.core.errors import StoreError
from or1.core.result_log import ResultLog

SETTINGS = {"limits": (1, 2)}


def filled(path: Path) -> list[bytes]:
    with ResultLog(path, SETTINGS) as log:
        for number in range(3):
            log.add(f"k{number}", {"n": number})
    return path.read_bytes().splitlines(keepends=True)


def keys(path: Path) -> list[str]:
    with ResultLog(path, SETTINGS) as log:
        return [key for key in ("k0", "k1", "k2") if key in log]


def test_values_are_there_after_a_new_start(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    filled(path)
    with ResultLog(path, SETTINGS) as log:
        assert log["k2"] == {"n": 2} and "k3" not in log
        log.add("k1", {"n": 9})
    with ResultLog(path, SETTINGS) as log:
        assert log["k1"] == {"n": 9}
    log.add("k3", {"n": 3})
    assert keys(path) == ["k0", "k1", "k2"]


@pytest.mark.parametrize("cut", [1, 20])
def test_an_incomplete_line_is_dropped_and_written_over(cut: int, tmp_path: Path) -> None:
    lines = filled(path := tmp_path / "log.jsonl")
    path.write_bytes(b"".join(lines)[:-cut])
    assert keys(path) == ["k0", "k1"]
    with ResultLog(path, SETTINGS) as log:
        log.add("k2", {"n": 2})
    assert path.read_bytes().splitlines(keepends=True) == lines


def test_an_altered_line_ends_the_log(tmp_path: Path) -> None:
    lines = filled(path := tmp_path / "log.jsonl")
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"n": 1', b'"n": 7'), lines[3]]))
    assert keys(path) == ["k0"]


def test_a_log_of_other_settings_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    filled(path := tmp_path / "log.jsonl")
    with pytest.raises(StoreError, match=r"other settings \(limits\)"):
        ResultLog(path, {"limits": [1, 3]})
    assert keys(path) == ["k0", "k1", "k2"]
    path.write_text("question,answer\n")
    with pytest.raises(StoreError, match="does not begin as a log"):
        ResultLog(path, SETTINGS)
    assert path.read_text() == "question,answer\n"


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with ResultLog(path, SETTINGS), pytest.raises(StoreError, match="in use"):
        ResultLog(path, SETTINGS)
