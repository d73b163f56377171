"""Full disks, locks, pauses, signals, data that changed, damaged rollouts: the run goes on, or says what is wrong."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hand_run import EOS, ONE, ZERO, config_of, group, response, trainer_of
from safetensors import SafetensorError
from small_run import ROOT

import or1.run.checkpoint_writer as writing
from or1.cli import main
from or1.config import EvalSet
from or1.config.load import load_config
from or1.core.errors import ConfigError, DiskError, RolloutError, RunError, StoreError
from or1.core.files import SEAL
from or1.core.types import OpenGroup, Prompt
from or1.data import SamplerState
from or1.dist.oom_retry import Budget
from or1.dist.watchdog import Watchdog
from or1.dist.world import SINGLE
from or1.eval.store import PartStore
from or1.report.rank_display import RankDisplay
from or1.run.checkpoint import Checkpoint, committed_steps
from or1.run.checkpoint_writer import CheckpointWriter
from or1.run.in_flight import InFlight
from or1.run.lock import RunLock
from or1.run.rollout_log import read_rollouts, write_rollouts
from or1.trainer import Trainer


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"step": step}, {"master.w": torch.zeros(4)})


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int, int], None]:
    """A disk on which a folder has room for so many shards."""
    plain = writing.save_file

    def limit(folder: Path, room: int, error: int = errno.ENOSPC) -> None:
        def save(tensors: dict[str, Any], path: Path) -> None:
            if len(list(folder.glob("*/shard_*.safetensors"))) >= room:
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(error)} (os error {error})")
            plain(tensors, path)

        monkeypatch.setattr(writing, "save_file", save)

    return limit


def test_a_full_disk_drops_old_checkpoints_before_it_fails(disk: Callable, tmp_path: Path) -> None:
    disk(tmp_path, 3)
    writer = CheckpointWriter(tmp_path, keep=3)
    for step in range(1, 6):
        writer.save(checkpoint(step))
        writer.wait()
    assert committed_steps(tmp_path) == [3, 4, 5], "the fourth had no room beside three others"
    disk(tmp_path, 2)
    writer.save(checkpoint(6))
    writer.wait()
    assert committed_steps(tmp_path) == [5, 6], "and a lower checkpoint.keep is not needed"


def test_the_newest_checkpoint_that_verifies_is_never_dropped(disk: Callable, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=9)
    for step in (1, 2, 3):
        writer.save(checkpoint(step))
        writer.wait()
    (tmp_path / "step_3" / "shard_0.safetensors").write_bytes(b"")
    disk(tmp_path, 2, errno.EDQUOT)
    writer.save(checkpoint(4))
    with pytest.raises(DiskError, match="the quota is used up"):
        writer.wait()
    assert committed_steps(tmp_path) == [2, 3]


@pytest.mark.parametrize(
    ("number", "told"), [(errno.EFBIG, "raise the limit"), (errno.EDQUOT, "quota"), (errno.ENOSPC, "make room")]
)
def test_a_save_without_room_says_what_is_used_up_and_that_nothing_stands(
    number: int, told: str, disk: Callable, tmp_path: Path
) -> None:
    disk(tmp_path, 0, number)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(checkpoint(1))
    with pytest.raises(DiskError, match=rf"{os.strerror(number)}.*{told}.*No checkpoint stands"):
        writer.wait()


def test_a_failed_save_leaves_nothing_when_the_run_ends_otherwise(disk: Callable, tmp_path: Path) -> None:
    disk(tmp_path, 0)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(checkpoint(1))
    writer._job.join()
    assert list(tmp_path.iterdir())
    writer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "told"), [(errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f"), (errno.ENOSPC, "the disk is full")]
)
def test_no_room_for_metrics_or_rollouts_is_one_line(
    number: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(_: object) -> int:
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    monkeypatch.setattr("or1.commands.report.run", write)
    assert main(["report", "run"]) == 75
    assert told in capsys.readouterr().err


def test_a_file_that_cannot_be_used_is_one_line_and_a_bug_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = PermissionError(errno.EACCES, "Permission denied", "/some/weights")

    def read(_: object) -> int:
        raise found

    monkeypatch.setattr("or1.commands.report.run", read)
    assert main(["report", "run"]) == 70
    assert "'/some/weights'" in capsys.readouterr().err
    found = OSError("a bug")
    with pytest.raises(OSError, match="a bug"):
        main(["report", "run"])


class Messages:
    """The messages of a run."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


def resumed(config: Any) -> tuple[Trainer, list[str]]:
    messages = Messages()
    return Trainer(config, RankDisplay(Watchdog(SINGLE, 60.0), messages)), messages.said


def save_with(config: Any, **state: Any) -> None:
    trainer = trainer_of(config)
    trainer.state.step = 1
    for name, value in state.items():
        setattr(trainer.state, name, value)
    trainer._save()
    trainer.checkpoints.wait()


def test_data_that_shrank_begins_the_next_epoch_and_says_so(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    save_with(config, sampler=SamplerState(0, 2))
    (tmp_path / "train.jsonl").write_text('{"question": "1+1", "answer": "0"}\n')
    trainer, said = resumed(config)
    assert trainer.state.sampler == SamplerState(1, 0)
    assert any("the data has 1 prompts and 2 of the epoch were taken before; epoch 1 begins" in line for line in said)
    assert trainer.sampler.take(trainer.state.sampler, 2)[0].tolist() == [0, 0]


UNFIT: list[tuple[str, Any]] = [
    ("step", -1),
    ("step", 40),
    ("odd", 1),
    ("state", []),
    ("tensors", {}),
    ("tensors", None),
    ("state.watch", KeyError),
    ("state.odd", 1),
    ("state.updates", "x"),
    ("state.updates", -1),
    ("state.policy_version", None),
    ("state.inputs", None),
    ("state.budget", {"max_tokens": -5}),
    ("state.budget", [1]),
    ("state.step", 1),
    ("state.totals", []),
    ("state.stages", {"index": None}),
    ("state.sampler", {"epoch": 0}),
    ("state.solved", {}),
    ("state.entropy", {"coef": "x"}),
    ("state.in_flight", {"groups": 3}),
]


@pytest.mark.parametrize(("name", "value"), UNFIT, ids=str)
def test_state_that_does_not_fit_is_told_and_the_checkpoint_before_is_used(
    name: str, value: Any, tmp_path: Path
) -> None:
    """Manifests of an older or1, which have no sha256 of their own."""
    config = config_of(tmp_path)
    for step in (1, 2):
        save_with(config, step=step)
    path = tmp_path / "run" / "checkpoints" / "step_2" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[SEAL]
    place, last = (manifest["state"], name.removeprefix("state.")) if "." in name else (manifest, name)
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(manifest))
    trainer, said = resumed(config)
    assert trainer.state.step == 1 and "resumed after step 1" in said
    assert any("step" in line and "falling back to the one before" in line for line in said)


@pytest.mark.parametrize("ahead", [False, True])
def test_open_responses_follow_their_prompts_and_go_with_them(ahead: bool, tmp_path: Path) -> None:
    from or1.rollout.collect import Rollout

    config = config_of(tmp_path)
    prompts = trainer_of(config).data.prompts
    answers = (response(ZERO, ONE), response(ONE, EOS))
    carried = [OpenGroup(prompt, answers, (None, None)) for prompt in prompts]
    closed = [replace(group([1, 0], list(answers)), prompt=prompt) for prompt in prompts]
    rollout = Rollout(closed, 1.0, 2.0, list(carried)) if ahead else None

    def save() -> None:
        trainer = trainer_of(config)
        trainer.state.step = 1
        trainer.state.in_flight = InFlight(
            rollout
            and replace(
                rollout, groups=[replace(g, prompt=p) for g, p in zip(closed, trainer.data.prompts, strict=True)]
            ),
            [replace(g, prompt=p) for g, p in zip(carried, trainer.data.prompts, strict=True)],
        )
        trainer._save()
        trainer.checkpoints.wait()

    save()
    rows = [{"question": question, "answer": "0"} for question in ("9+9", "1+3", "1+1")]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    trainer, said = resumed(config)
    in_flight = trainer.state.in_flight
    # By their tokens: the id of a prompt may be its line.
    texts = [g.prompt.token_ids.tolist() for g in in_flight.carried]
    assert texts == [prompts[0].token_ids.tolist(), prompts[2].token_ids.tolist()]
    assert [g.prompt for g in in_flight.carried] == [trainer.data.prompts[2], trainer.data.prompts[1]]
    assert all(np.array_equal(g.responses[0].token_ids, answers[0].token_ids) for g in in_flight.carried)
    if ahead:
        assert [g.prompt for g in in_flight.ahead.groups] == [trainer.data.prompts[2], trainer.data.prompts[1]]
        assert in_flight.ahead.groups[0].scores == closed[0].scores
    assert f"{2 if ahead else 1} groups under way are dropped" in "\n".join(said)


def test_open_responses_of_an_older_or1_go_by_their_place(tmp_path: Path) -> None:
    trainer = trainer_of(config_of(tmp_path))
    prompts = trainer.data.prompts
    open_groups = [OpenGroup(p, (response(ZERO),), (None,)) for p in prompts]
    state, tensors = InFlight(None, open_groups).to_checkpoint(prompts)
    state["groups"] = [each[:2] for each in state["groups"]]
    found = InFlight.from_checkpoint(state, tensors, prompts[:2], trainer.tokenizer)
    assert [g.prompt for g in found.carried] == list(prompts[:2]) and found.lost == 1


def test_a_rank_that_was_paused_itself_gives_the_others_that_time(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog(SINGLE, 6.0)
    watchdog._seen = {1: ({"step": 0, "phase": "start"}, 100.0)}
    watchdog._forgive(1.0)
    assert watchdog._seen[1][1] == 100.0, "a little late is no pause"
    watchdog._forgive(14.0)
    assert watchdog._seen[1][1] == 114.0


class PausedStore:
    """A store whose other rank gives no sign."""

    def set(self, key: str, value: str) -> None:
        """See TCPStore."""

    def multi_get(self, keys: list[str]) -> list[str]:
        """See TCPStore."""
        return [json.dumps({"step": 1, "phase": "train", "done": 0, "total": None, "beat": 1}) for _ in keys]


@pytest.mark.parametrize("paused", [True, False])
def test_only_silence_that_this_rank_was_awake_for_ends_the_run(paused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = [0.0], [0]
    watchdog = Watchdog(replace(SINGLE, size=1), 6.0)
    watchdog.world = replace(SINGLE, size=2)
    watchdog._store = PausedStore()

    class Ended(Exception):
        pass

    def wait(period: float) -> bool:
        looks[0] += 1
        clock[0] += 14.0 if paused and looks[0] == 3 else 0.1 if paused else period
        return looks[0] > 10

    def give_up(reason: str) -> None:
        raise Ended(reason)

    monkeypatch.setattr("or1.dist.watchdog.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog._stopped, "wait", wait)
    monkeypatch.setattr(watchdog, "_give_up", give_up)
    if paused:
        watchdog._watch()
    else:
        with pytest.raises(Ended, match="no sign of life"):
            watchdog._watch()


IGNORING = """
import signal, sys
from or1.dist import local_ranks
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_IGN)
import torch.distributed.elastic.multiprocessing as elastic
class Ranks:
    def pids(self): return {}
    def wait(self, period):
        hup, quit, term = map(signal.getsignal, (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM))
        print(hup, quit, callable(term))
        return None
def start(**options):
    # What torch's own does.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: sys.exit(9))
    print(options["logs_specs"].root_log_dir)
    return Ranks()
elastic.start_processes = start
assert local_ranks.run_ranks(2, []) == 0
print(signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM))
"""


def test_what_nohup_ignores_stays_ignored_and_torch_leaves_no_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IGNORING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logs, during, after = done.stdout.splitlines()
    ignored = str(signal.SIG_IGN)
    assert during == f"{ignored} {ignored} True" and after == f"{ignored} {signal.SIG_DFL}"
    assert logs.startswith(str(tmp_path)) and not list(tmp_path.iterdir())


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_live_holder_keeps_the_folder(no_locks: None, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as holder:
        about = {"host": socket.gethostname(), "pid": holder.pid}
        (tmp_path / ".lock").write_text(json.dumps(about) + "\n")
        os.utime(tmp_path / ".lock", (time.time() + 5,) * 2)
        with pytest.raises(RunError, match=f"is at work .*{holder.pid}"):
            RunLock(tmp_path).take(make=True)
        holder.kill()
    lock = RunLock(tmp_path)
    lock.take(make=True)
    assert "has no locks (No locks available)" in lock.warnings[0] and "another machine" not in lock.warnings[0]
    lock.close()
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    lock.take(make=True)
    assert "names a process of another machine" in lock.warnings[0]


@pytest.mark.parametrize("text", ["", "\x00\x01", "[1]", "{}", '{"host": 3, "pid": "x"}'])
def test_a_damaged_lock_is_no_hindrance(text: str, no_locks: None, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(text)
    lock = RunLock(tmp_path)
    lock.take(make=True)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_process_that_took_an_old_number_is_no_holder(no_locks: None, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": other.pid}))
        os.utime(tmp_path / ".lock", (1e9, 1e9))
        RunLock(tmp_path).take(make=True)
        other.kill()


def rollouts(folder: Path) -> tuple[Path, dict[str, Prompt]]:
    groups = [
        replace(
            group([1.0, 0.0], [response(ZERO, ONE, EOS, text="01\u00e9"), response(ONE, text="")]),
            prompt=Prompt(name, "s", "1+1", np.array([7], np.int32), ("0",)),
        )
        for name in "ab"
    ]
    path = write_rollouts(folder / "rollouts", 3, 0, groups, [[1.0, -1.0], None])
    return path, {g.prompt.id: g.prompt for g in groups}


def test_rollouts_come_back_and_every_flipped_bit_is_told_or_harmless(tmp_path: Path) -> None:
    path, prompts = rollouts(tmp_path)
    whole, dice = path.read_bytes(), np.random.default_rng(5)
    want = repr(read_rollouts(path, 3, prompts, 2))
    told = 0
    for place in dice.integers(0, 8 * len(whole), 400).tolist():
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            assert repr(read_rollouts(path, 3, prompts, 2)) == want, f"bit {place}"
        except RolloutError as error:
            told += 1
            assert str(path) in str(error)
    assert told > 50


@pytest.mark.parametrize("size", [0, 4, 100, 1000])
def test_cut_or_exchanged_rollouts_are_one_line(size: int, tmp_path: Path) -> None:
    path, prompts = rollouts(tmp_path)
    with pytest.raises(RolloutError, match="holds the rollouts of step 3"):
        read_rollouts(path, 4, prompts, 2)
    os.truncate(path, size)
    with pytest.raises(RolloutError, match="cannot be read"):
        read_rollouts(path, 3, prompts, 2)


def test_rollouts_of_an_older_or1_are_read(tmp_path: Path) -> None:
    path, prompts = rollouts(tmp_path)
    want = repr(read_rollouts(path, 3, prompts, 2))
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path, compression="zstd")
    assert repr(read_rollouts(path, 3, prompts, 2)) == want


def test_rollouts_into_a_folder_that_is_gone_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="was removed or renamed while the run was at work"):
        rollouts(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


SCHEMA = pa.schema({"x": pa.int64()})


def store(folder: Path, **settings: Any) -> PartStore:
    return PartStore(folder / "parts", folder / "all.parquet", {"seed": 1} | settings, SCHEMA, 2)


def test_damaged_or_exchanged_parts_are_sampled_again(tmp_path: Path) -> None:
    parts = store(tmp_path)
    for index in range(4):
        parts.write(index, [{"x": 10 * index}, {"x": 10 * index + 1}])
    paths = sorted((tmp_path / "parts").glob("part_*.parquet"))
    paths[0].write_bytes(paths[1].read_bytes())
    data = bytearray(paths[2].read_bytes())
    data[data.index(b"PAR1") + 40] ^= 4
    paths[2].write_bytes(data)
    parts = store(tmp_path)
    assert [index in parts for index in range(4)] == [False, True, False, True]


def test_changed_settings_of_parts_and_damaged_results_are_one_line(tmp_path: Path) -> None:
    parts = store(tmp_path)
    parts.write(0, [{"x": 1}])
    record = tmp_path / "parts" / "settings.json"
    record.write_text(record.read_text().replace('"part_size": 2', '"part_size": 3'))
    with pytest.raises(StoreError, match="it was altered"):
        store(tmp_path)
    record.write_text(json.dumps({"seed": 1, "part_size": 2, "merged": False}))
    parts = store(tmp_path)
    assert 0 in parts, "parts of an older or1"
    parts.merge()
    data = bytearray((tmp_path / "all.parquet").read_bytes())
    data[40] ^= 4
    (tmp_path / "all.parquet").write_bytes(data)
    with pytest.raises(StoreError, match=r"all\.parquet cannot be read"):
        list(store(tmp_path).tables())


@pytest.mark.parametrize("name", ["..", ".", "...."])
def test_an_eval_set_cannot_be_a_folder_above(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        EvalSet(name=name, path="x")
    assert EvalSet(name="aime.24", path="x").name == "aime.24"


def test_a_path_that_the_locale_cannot_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9")
    with pytest.raises(ConfigError, match="set LANG to a UTF-8 locale"):
        load_config(ROOT / "examples/quickstart.toml", [f"run_dir={place}"], files=False)
    os.makedirs(place)
    Path(place, "config.resolved.json").write_text("{}")
    assert main(["eval", place]) == 2
    assert "PYTHONUTF8=1" in capsys.readouterr().err


TALKING = """
import sys
from or1.core.terminal import guard_terminal
guard_terminal()
from or1.report.console import default_console
console = default_console()
for _ in range(1000):
    console.print("x" * 100)
print("plain", flush=True)
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("where", [">&-", "| head -1", "> /dev/full"])
def test_standard_output_that_is_gone_does_not_end_a_command(where: str) -> None:
    script = 'set -o pipefail; "$@" ' + where
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-c", TALKING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert done.stderr.endswith("done\n")
    if where != ">&-":
        assert done.stderr.count("standard output cannot be written any more") == 1


class Racing:
    """A save that fails between two looks at it."""

    error: str | None = None

    def is_alive(self) -> bool:
        """See Thread."""
        self.error = "the disk is gone"
        return False


def test_a_save_that_fails_between_two_looks_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer._job = Racing()
    failed: list[bool] = []
    monkeypatch.setattr(writer, "_fail", lambda: failed.append(True))
    writer.poll()
    assert failed == [True]


def test_a_lowered_budget_holds_a_longer_sequence_that_comes_later() -> None:
    budget, asked = Budget(100), []
    budget.max_tokens = 24
    assert budget.run(lambda tokens: asked.append(tokens) or tokens, longest=40) == 40
    assert budget.run(lambda tokens: asked.append(tokens) or tokens, longest=10) == 24 and budget.max_tokens == 24
