"""The cache: hits, damage, foreign files, other versions, two writers at once."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from or1.tune import cache
from or1.tune.choice import Choice, Record, Trial


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "or1" / "tune"


def record(torch: str = "2.13.0", **choice: object) -> Record:
    key = {"device": {"name": "card"}, "versions": {"torch": torch}, "case": {"vocab": 7}, "pins": {}}
    trial = Trial("head", "native", {"head_impl": "native"}, [0.25, 0.5], 0.1, 0.7, "", chosen=True)
    return Record(key, Choice.of({"head_impl": "native"} | choice), {"head": 1e12}, (trial,), "2026-01-01 10:00")


def test_a_record_comes_back_as_it_was(home: Path) -> None:
    said: list[str] = []
    path = cache.keep(record(), said.append)
    assert path is not None and path.parent == home
    assert cache.find(record().key, said.append) == record() and not said
    assert [*cache.records()] == [record()]


def test_another_version_or_shape_is_another_measurement() -> None:
    said: list[str] = []
    cache.keep(record(), said.append)
    assert cache.find(record("2.14.0").key, said.append) is None
    assert cache.find(record().key | {"case": {"vocab": 8}}, said.append) is None
    assert not said


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("native", "triton", 1),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: "[" * 100_000,
        lambda text: text + " " * (1 << 20),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "sha256"}),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_file_is_named_and_ignored_and_can_be_replaced(damage, home: Path) -> None:
    path = cache.keep(record(), print)
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    said: list[str] = []
    assert cache.find(record().key, said.append) is None
    assert len(said) == 1 and str(path) in said[0] and "remove it" in said[0]
    assert [*cache.records()] == []
    cache.keep(record(), said.append)
    assert cache.find(record().key, said.append) == record() and len(said) == 1


def test_a_file_of_another_key_is_foreign(home: Path) -> None:
    said: list[str] = []
    cache.keep(record("2.14.0"), said.append)
    cache.file_of(record("2.14.0").key).rename(cache.file_of(record().key))
    assert cache.find(record().key, said.append) is None
    assert "another machine, version or model" in said[0]


@pytest.mark.parametrize("value", [{"head_impl": 3}, {"threads": 0}, {"threads": True}, {"colour": "red"}])
def test_a_value_that_is_no_choice_is_refused(value: dict) -> None:
    data = record().as_json()
    data["choice"] = value
    with pytest.raises(ValueError, match="is no choice"):
        Record.of(data)


def test_a_folder_that_cannot_be_written_costs_a_message(home: Path) -> None:
    home.parent.mkdir(parents=True)
    home.write_text("a file")
    said: list[str] = []
    assert cache.keep(record(), said.append) is None
    assert "set XDG_CACHE_HOME" in said[0]


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache.folder() == Path.home() / ".cache" / "or1" / "tune"


def _write(number: int) -> None:
    for _ in range(40):
        assert cache.keep(record(threads=number), print) is not None


def test_two_processes_at_once_leave_a_whole_file(home: Path) -> None:
    start = multiprocessing.get_context("fork").Process
    writers = [start(target=_write, args=(number,)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    said: list[str] = []
    while any(writer.is_alive() for writer in writers):
        found = cache.find(record().key, said.append)
        assert found is None or found.choice.threads in (1, 2)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert not said and len(os.listdir(home)) == 1
