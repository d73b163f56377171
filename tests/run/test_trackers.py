"""Trackers: a failure or a slow host changes nothing, a resumed run continues the same one, no step is doubled."""

from __future__ import annotations

import json
import secrets
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from or1.cli import main
from or1.config.load import load_config
from or1.core.errors import ConfigError
from or1.run import trackers
from or1.run.trackers import Mark, Tracker, Trackers
from tests.helpers.small_run import ROOT, arguments, lines


class Fake:
    """A writer that keeps what it is given; `blocked` holds it up, `fails` names the method that raises."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails, self.blocked = fails, threading.Event()
        self.blocked.set()

    def _do(self, *call: Any) -> None:
        self.blocked.wait(20)
        if call[0] == self.fails:
            raise RuntimeError("no route to\nhost")
        self.calls.append(call)

    def start(self) -> None:
        self._do("start")

    def log(self, step: int, metrics: dict, rows: list) -> None:
        self._do("log", step, metrics, rows)

    def alarm(self, step: int, text: str) -> None:
        self._do("alarm", step, text)

    def finish(self, failed: bool) -> None:
        self._do("finish", failed)

    @property
    def steps(self) -> list[int]:
        return [call[1] for call in self.calls if call[0] == "log"]


def begun(writer: Fake, run_dir: Path, told: list[str]) -> Trackers:
    return Trackers([Tracker("wandb", writer, Mark.read(run_dir, "wandb", "project"))], tell=told.append)


def test_a_resumed_run_continues_and_repeats_no_step(tmp_path: Path) -> None:
    told: list[str] = []
    for first, last in ((0, 5), (3, 8)):
        writer = Fake()
        of_run = begun(writer, tmp_path, told)
        for step in range(first, last):
            of_run.log(step, {"a": 1.0, "b": float("nan")})
            of_run.alarm(step, "entropy")
        of_run.close(failed=last == 8)
        assert writer.steps == ([0, 1, 2, 3, 4] if first == 0 else [5, 6, 7])
        alarms = [call[1] for call in writer.calls if call[0] == "alarm"]
        assert alarms == writer.steps and writer.calls[1][2] == {"a": 1.0}
        assert writer.calls[-1] == ("finish", last == 8)
    mark = Mark.read(tmp_path, "wandb", "project")
    assert mark.step == 7 and not told
    assert Mark.read(tmp_path, "wandb", "other").id != mark.id
    (tmp_path / ".wandb.json").write_text("[")
    assert Mark.read(tmp_path, "wandb", "project").step == -1


def test_a_tracker_turned_on_late_is_sent_the_steps_before(tmp_path: Path) -> None:
    writer = Fake()
    of_run = begun(writer, tmp_path, [])
    of_run.recall([{"step": n, "stage": 0, "time": 1.0, "loss": None, "reward/mean": 0.5} for n in range(3)])
    of_run.log(3, {})
    of_run.close()
    assert writer.steps == [0, 1, 2, 3] and writer.calls[1][2] == {"stage": 0, "reward/mean": 0.5}


@pytest.mark.parametrize("method", ["start", "log", "alarm", "finish"])
def test_a_failure_is_told_once(method: str, tmp_path: Path) -> None:
    told: list[str] = []
    writer = Fake(method)
    of_run = begun(writer, tmp_path, told)
    for step in range(4):
        of_run.log(step, {})
        of_run.alarm(step, "x")
    of_run.close()
    of_run.log(9, {})
    assert len(told) == 1 and "log.wandb: sends nothing more (no route to host)" in told[0]


def test_a_host_that_does_not_answer_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_FINISH_S", 0.1)
    monkeypatch.setattr(trackers, "_MOST_WAITING", 10)
    told: list[str] = []
    writer = Fake()
    writer.blocked.clear()
    of_run = begun(writer, tmp_path, told)
    began = time.monotonic()
    for step in range(1000):
        of_run.log(step, {})
    of_run.close()
    assert time.monotonic() - began < 3
    assert len(told) == 2 and "10 steps behind" in told[0] and "was not done" in told[1]
    writer.blocked.set()


def test_a_missing_package_is_told_when_the_config_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("or1.config.rules.distributions", lambda name: [])
    with pytest.raises(ConfigError, match=r"1 problem\n.*pip install 'or1\[trackio\]'"):
        load_config(ROOT / "examples/quickstart.toml", ["log.trackio=sums"])


def records(path: Path) -> Iterator[Any]:
    """Yield the protocol records of a .wandb file: blocks of 32 KiB with parts of (crc, length, kind)."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if not kind:
            return
        whole = data[at + 7 : at + 7 + length] if kind in (1, 2) else whole + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


@pytest.mark.integrations
def test_real_trackers_continue_a_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    monkeypatch.setenv("WANDB_MODE", "offline")
    from trackio.sqlite_storage import SQLiteStorage  # Its folder is fixed when it is imported.

    run_dir = tmp_path / "run"
    settings = {"log__wandb": "sums", "log__trackio": f"sums-{secrets.token_hex(4)}", "log__samples": 2}
    for steps in (1, 2):
        assert main(arguments(run_dir, stage__0__steps=1, stage__1__steps=steps, **settings)) == 0
    done = [line["step"] for line in lines(run_dir)]
    assert done[-1] == 3 and "sends nothing more" not in capsys.readouterr().out
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    found = [record for file in files for record in records(file)]
    history = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    assert [one.step.num for one in history] == done
    names = {item.key or item.nested_key[0] for one in history for item in one.item}
    assert {"reward/mean", "stage", "samples"} <= names
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    ids = {run.run_id for run in runs}
    assert len(files) == 2 and ids == {json.loads((run_dir / ".wandb.json").read_text())["id"]}
    assert {"versions", "optim", "stage"} <= {item.key for item in runs[0].config.update}
    tables = [json.loads(file.read_text()) for file in (run_dir / "wandb").glob("*/files/media/table/*.json")]
    assert tables and tables[0]["columns"][:3] == ["prompt", "response", "reward"]
    with sqlite3.connect(SQLiteStorage.get_project_db_path(settings["log__trackio"])) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert [step for _, step, _ in rows] == done and len({name for name, _, _ in rows}) == 1
    assert json.loads(rows[-1][2])["reward/mean"] == lines(run_dir)[-1]["reward/mean"]
