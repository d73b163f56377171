"""The record of a run's settings: whole whatever happens, and told about where it is not."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_run import ROOT, arguments

from or1.cli import main
from or1.config import Config
from or1.config_load import load_config
from or1.run_state import RECORD, prepare_run_dir, recorded_config


def config_of(run_dir: Path, *overrides: str) -> Config:
    return load_config(ROOT / "examples/quickstart.toml", [f"run_dir={run_dir}", *overrides], files=False)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What is written beyond `size` bytes fails, as on a disk that fills up midway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_start_that_fails_midway_leaves_the_record_whole(tmp_path: Path) -> None:
    prepare_run_dir(config_of(tmp_path))
    before = (tmp_path / RECORD).read_text()
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        prepare_run_dir(config_of(tmp_path, "log.tensorboard=false"))
    assert (tmp_path / RECORD).read_text() == before
    assert prepare_run_dir(config_of(tmp_path, "log.tensorboard=false"))[0].endswith("log.tensorboard")
    assert recorded_config(tmp_path)["log"]["tensorboard"] is False
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


@pytest.mark.parametrize("content", ["", '{"seed": 0', "[1]", "\udcff"])
def test_a_record_that_cannot_be_read_is_told_with_a_remedy(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / RECORD).write_text(content, errors="surrogateescape")
    for command in (arguments(tmp_path), ["export", str(tmp_path)], ["replay", str(tmp_path), "1"]):
        assert main(command) == 70
        said = capsys.readouterr().err
        assert f"{tmp_path / RECORD} does not hold a run's settings" in said and "remove it" in said
    (tmp_path / RECORD).unlink()
    assert prepare_run_dir(config_of(tmp_path)) == [], "what the remedy says"
    assert json.loads((tmp_path / RECORD).read_text())["run_dir"] == str(tmp_path)
