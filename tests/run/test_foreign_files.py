"""Links that others put into a run's folder, and folders of others; files there that nobody can parse."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from or1.cli import main
from or1.config.load import load_config
from or1.core.errors import ConfigError, RunError, StoreError
from or1.core.files import without_links, write_whole
from or1.eval.store import PartStore
from or1.run import lock as run_lock
from or1.run.directory import RECORD, cap_rows, prepare_run_dir, recorded_config, row_cap
from or1.run.lock import RunLock
from or1.run.metrics_log import rewind_metrics
from tests.helpers.small_run import ROOT, arguments

STRANGER = 54321
DEEP, DIGITS = "[" * 100_000, '{"x": ' + "9" * 5000 + "}"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Write a file that no run may touch."""
    path = tmp_path / "thesis.tex"
    path.write_text("mine")
    return path


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a folder of another user."""
    folder = tmp_path / "run"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, STRANGER, STRANGER)
    else:
        monkeypatch.setattr(run_lock.os, "geteuid", lambda: STRANGER)
        # What a stranger would create there is not of this folder's owner.
        trying_gives(Path("/dev/null"), monkeypatch)
    return folder


def trying_gives(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file by which a folder is tried be this one."""

    def made(**_: object) -> IO[bytes]:
        return path.open("rb")

    monkeypatch.setattr(run_lock.tempfile, "TemporaryFile", made)


def test_a_half_written_file_is_no_way_to_another_one(mine: Path, tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    (tmp_path / ".config.json.partial").symlink_to(mine)
    write_whole(target, "new")
    assert mine.read_text() == "mine" and target.read_text() == "new" and not target.is_symlink()

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n')
    for name in ("metrics.partial", ".metrics.jsonl.partial"):
        (tmp_path / name).symlink_to(mine)
    rewind_metrics(metrics, 1)
    assert mine.read_text() == "mine" and metrics.read_text() == '{"step": 1}\n'

    (tmp_path / f".row_tokens.json.{os.getpid()}.partial").symlink_to(mine)
    cap_rows(tmp_path, 5)
    assert mine.read_text() == "mine" and row_cap(tmp_path) == 5


def test_a_link_in_the_place_of_a_file_is_refused(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mine)
    with (
        pytest.raises(OSError, match="symbolic link, which or1 does not write through; remove it"),
        open(tmp_path / "link", "w", opener=without_links),
    ):
        pass
    assert mine.read_text() == "mine"


def test_the_parts_of_an_evaluation_write_through_no_link(mine: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("settings.partial", ".settings.json.partial"):
        (folder / name).symlink_to(mine)
    (tmp_path / ".all.parquet.partial").symlink_to(mine)
    store = PartStore(folder, tmp_path / "all.parquet", {}, pa.schema({"x": pa.int64()}), 2)
    store.write(0, [{"x": 1}])
    store.merge()
    assert mine.read_text() == "mine" and not (tmp_path / "all.parquet").is_symlink()


def test_new_files_keep_the_users_own_rights(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        with open(tmp_path / "x", "w", opener=without_links):
            assert os.stat(tmp_path / "x").st_mode & 0o777 == 0o640
    finally:
        os.umask(former)


def test_a_lock_is_no_way_to_another_file(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(mine)
    for make in (True, False):
        with pytest.raises(RunError, match=r"symbolic link.*remove it.*\.lock"):
            RunLock(tmp_path / "run").take(make)
    assert main(arguments(tmp_path / "run")) == 70
    assert mine.read_text() == "mine" and "symbolic link" in capsys.readouterr().err


def test_a_folder_of_another_user_is_refused_before_anything_is_written(
    foreign: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (foreign / ".config.resolved.json.partial").symlink_to(mine)
    assert main(arguments(foreign)) == 70
    said = capsys.readouterr().err
    assert f"{foreign} belongs to another user (" in said and "--set run_dir=..." in said and "chown" in said
    assert mine.read_text() == "mine" and [p.name for p in foreign.iterdir()] == [".config.resolved.json.partial"]


def test_a_disk_that_shows_everything_as_one_users_is_fine(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (foreign / "new").write_text("")
    os.chown(foreign / "new", foreign.stat().st_uid, -1)
    trying_gives(foreign / "new", monkeypatch)
    RunLock(foreign).take(make=True)
    assert (foreign / ".lock").is_file()


def test_a_folder_of_root_or_of_ones_own_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunLock(tmp_path).take(make=True)
    monkeypatch.setattr(run_lock.os, "geteuid", lambda: STRANGER)
    run_lock._require_own_folder(Path("/"))
    run_lock._require_own_folder(tmp_path / "none")


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "read-only")])
def test_a_folder_that_cannot_be_tried_is_one_line(
    error: OSError, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(run_lock.tempfile, "TemporaryFile", refuse)
    with pytest.raises(RunError, match="cannot be written"):
        RunLock(foreign).take(make=True)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", DEEP, "nests too deeply"),
        ("a.toml", "x = " + DEEP, "nests too deeply"),
        ("a.json", DIGITS, "cannot be read"),
        ("a.toml", "seed = " + "9" * 5000, "cannot be read"),
        ("a.json", "[1]", "holds a list"),
        ("a.json", "null", "holds a NoneType"),
        ("a.json", "{", "is not JSON"),
    ],
)
def test_a_config_that_no_parser_reads_is_one_line(
    name: str, text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_config(tmp_path / name)
    assert main(["train", str(tmp_path / name)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("value", [DEEP, "9" * 5000])
def test_an_override_that_no_parser_reads_is_one_line(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set seed: has a value that cannot be read"):
        load_config(ROOT / "examples/quickstart.toml", [f"seed={value}"], files=False)


def as_record(folder: Path, text: str) -> None:
    (folder / RECORD).write_text(text)
    recorded_config(folder)


def as_row_cap(folder: Path, text: str) -> None:
    (folder / "row_tokens.json").write_text(text)
    row_cap(folder)


def as_parts(folder: Path, text: str) -> None:
    pa = pytest.importorskip("pyarrow")
    (folder / "settings.json").write_text(text)
    PartStore(folder, folder / "all.parquet", {}, pa.schema({"x": pa.int64()}), 2)


@pytest.mark.parametrize("read", [as_record, as_row_cap, as_parts])
@pytest.mark.parametrize("text", [DEEP, DIGITS, "[]", "{"])
def test_a_damaged_file_of_a_run_is_one_line(read: Callable[[Path, str], None], text: str, tmp_path: Path) -> None:
    with pytest.raises((RunError, StoreError), match=r"remove it|--fresh"):
        read(tmp_path, text)


def test_what_a_run_leaves_is_read_back(tmp_path: Path) -> None:
    cap_rows(tmp_path, 77)
    assert row_cap(tmp_path) == 77
    prepare_run_dir(load_config(ROOT / "examples/quickstart.toml", [f"run_dir={tmp_path / 'run'}"], files=False))
    assert recorded_config(tmp_path / "run")["run_dir"] == str(tmp_path / "run")


@pytest.mark.parametrize(
    "text", [DEEP, DIGITS, "[]", "{", '{"model_type": "qwen2", "vocab_size": "many"}', '{"model_type": []}']
)
def test_a_plan_of_a_folder_that_describes_no_model_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    command = ["plan", str(ROOT / "examples/quickstart.toml"), "--set", f"model.path={tmp_path}", "--device", "H200"]
    assert main(command) == 2
    assert str(tmp_path) in capsys.readouterr().err
