"""The record of a run's settings: whole whatever happens, and told about where it is not."""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from or1.cli import main
from or1.config import Config
from or1.config.load import dump_config, load_config
from or1.core.errors import OtherSettingsError, RunError
from or1.run.directory import RECORD, prepare_run_dir, recorded_config
from or1.run.lock import RunLock
from or1.run.marks import NAME as MARKS
from tests.helpers.small_run import ROOT, arguments


def config_of(run_dir: Path, *overrides: str) -> Config:
    return load_config(ROOT / "examples/quickstart.toml", [f"run_dir={run_dir}", *overrides], files=False)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Make writes beyond `size` bytes fail, as on a disk that fills up midway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_start_that_fails_midway_leaves_the_record_whole(tmp_path: Path) -> None:
    prepare_run_dir(config_of(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    before = (tmp_path / RECORD).read_text()
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        prepare_run_dir(config_of(tmp_path, "log.tensorboard=false"))
    assert (tmp_path / RECORD).read_text() == before
    assert prepare_run_dir(config_of(tmp_path, "log.tensorboard=false"))[0].endswith("log.tensorboard: true -> false")
    assert recorded_config(tmp_path)["log"]["tensorboard"] is False
    assert {path.name for path in tmp_path.iterdir()} == {RECORD, ".marks.json", "metrics.jsonl"}


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


def commit(run_dir: Path, step: int, *stages: int) -> None:
    """Write a checkpoint of `step` that suffices for the checks of a run directory; `stages` is (index, began)."""
    folder = run_dir / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    state = {"step": step, "stages": {"index": stages[0], "began": stages[1], "history": []}}
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "step": step, "files": {}, "state": state}))


def test_a_start_that_trained_nothing_leaves_its_folder_free(tmp_path: Path) -> None:
    prepare_run_dir(config_of(tmp_path, "seed=1"))
    (tmp_path / "metrics.jsonl").write_text("")
    assert prepare_run_dir(config_of(tmp_path, "seed=2", 'data.train="other.jsonl"')) == []
    assert recorded_config(tmp_path)["seed"] == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(RunError, match=r"other settings \(data.train, seed\)"):
        prepare_run_dir(config_of(tmp_path, "seed=1"))
    (tmp_path / "metrics.jsonl").unlink()
    commit(tmp_path, 1, 0, 0)
    with pytest.raises(RunError, match=r"other settings \(data.train, seed\)"):
        prepare_run_dir(config_of(tmp_path, "seed=1"))


def test_what_reward_processes_may_take_can_change_with_the_machine(tmp_path: Path) -> None:
    prepare_run_dir(config_of(tmp_path))
    commit(tmp_path, 1, 0, 0)
    old = config_of(tmp_path).reward
    (said,) = prepare_run_dir(config_of(tmp_path, "reward.workers=1", "reward.memory_mib=0"))
    assert said.splitlines() == [
        "continues with changed settings:",
        f"    reward.memory_mib: {old.memory_mib} -> 0",
        f"    reward.workers: {old.workers} -> 1",
    ]
    with pytest.raises(OtherSettingsError, match=r"other settings \(reward.timeout_s\)") as caught:
        prepare_run_dir(
            config_of(tmp_path, "reward.workers=1", "reward.memory_mib=0", "reward.timeout_s=9", "log.samples=9")
        )
    assert str(caught.value).splitlines()[1:3] == [
        f"    reward.timeout_s: {old.timeout_s} -> 9.0",
        "    log.samples: 4 -> 9 (may change)",
    ]


def test_a_run_of_before_a_setting_was_goes_on_with_its_default(tmp_path: Path) -> None:
    """loss.entropy.measure and data.solved_visits are new, and what makes a plateau has other defaults than it had."""
    prepare_run_dir(config_of(tmp_path))
    commit(tmp_path, 40, 1, 30)
    (tmp_path / MARKS).unlink()  # an older or1 left none
    record = json.loads((tmp_path / RECORD).read_text())
    del record["loss"]["entropy"]["measure"], record["data"]["solved_visits"]
    for stage in record["stage"]:
        stage |= {"plateau_evals": 4, "plateau_gain": 0.01}
    old = json.dumps(record)
    for setting, said in (
        ('loss.entropy.measure="all"', "loss.entropy.measure"),
        ('data.solved_visits="last"', "data.solved_visits"),
    ):
        (tmp_path / RECORD).write_text(old)
        with pytest.raises(RunError, match=rf"other settings \({said}\)"):
            prepare_run_dir(config_of(tmp_path, setting))
    (said,) = prepare_run_dir(config_of(tmp_path))
    assert "stage.0.plateau_evals" in said and "loss" not in said and "data" not in said


LIMIT, STEPS, FLAT = "stage.{}.max_response_tokens=30", "stage.{}.steps=60", "stage.{}.until=plateau"


@pytest.mark.parametrize(
    ("step", "index", "began", "refused", "allowed"),
    [
        (3, 0, 0, [LIMIT.format(0)], [STEPS.format(0), FLAT.format(0), LIMIT.format(1), STEPS.format(1)]),
        (20, 1, 20, [LIMIT.format(0), STEPS.format(0)], [LIMIT.format(1), STEPS.format(1)]),
        (21, 1, 20, [STEPS.format(0), FLAT.format(0), LIMIT.format(1)], [STEPS.format(1), FLAT.format(1)]),
        (40, 2, 40, [STEPS.format(0), LIMIT.format(1)], [STEPS.format(1), FLAT.format(1)]),
    ],
)
def test_of_a_stage_that_has_begun_only_its_length_may_change(
    step: int, index: int, began: int, refused: list[str], allowed: list[str], tmp_path: Path
) -> None:
    prepare_run_dir(config_of(tmp_path))
    commit(tmp_path, step, index, began)
    before = (tmp_path / RECORD).read_text()
    for override in refused:
        with pytest.raises(RunError) as caught:
            prepare_run_dir(config_of(tmp_path, override))
        assert f"({override.partition('=')[0]}); of a stage that has begun only steps" in str(caught.value)
    assert (tmp_path / RECORD).read_text() == before
    for override in allowed:
        (said,) = prepare_run_dir(config_of(tmp_path, override))
        assert said.splitlines()[1].startswith(f"    {override.partition('=')[0]}: ")
        prepare_run_dir(config_of(tmp_path))


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_is_one_line(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for flags in ([], ["--fresh"]):
        assert main(arguments(tmp_path / place, *flags)) == 70
        assert f"run_dir = '{tmp_path / place}'" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("record", ['{"a": 1}', '{"run_dir": 3, "model": {"path": "m"}}'])
def test_a_foreign_record_is_one_line(record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RECORD).write_text(record)
    for command in (["export", str(tmp_path)], ["replay", str(tmp_path), "1"]):
        assert main(command) == 70
        assert f"{tmp_path / RECORD} is not the record of a run of this or1" in capsys.readouterr().err


def test_fresh_moves_a_run_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    assert prepare_run_dir(config_of(folder), fresh=True) == [], "an empty folder stays"
    assert "moved the former run" in prepare_run_dir(config_of(folder), fresh=True)[0]
    (folder / RECORD).rename(folder / "thesis.tex")
    with pytest.raises(RunError, match="holds no run"):
        prepare_run_dir(config_of(folder), fresh=True)
    assert (folder / "thesis.tex").is_file()


def test_a_folder_where_a_run_is_at_work_is_neither_joined_nor_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_run_dir(config_of(tmp_path / "run"))
    lock = RunLock(tmp_path / "run")
    lock.take(make=True)
    for flags in ([], ["--fresh"]):
        assert main(arguments(tmp_path / "run", *flags)) == 70
        said = capsys.readouterr().err
        assert f'at work ({{"host": "{socket.gethostname()}", "pid": {os.getpid()}}})' in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    lock.close()
    RunLock(tmp_path / "run").take(make=False)


def test_an_interrupt_says_whether_there_is_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("or1.commands.train.print_plan", interrupt)
    assert main(arguments(tmp_path)) == 130
    assert "starts anew, since there is no checkpoint yet" in capsys.readouterr().err
    commit(tmp_path, 1, 0, 0)
    assert main(arguments(tmp_path)) == 130
    assert "resumes after step 1, the newest checkpoint" in capsys.readouterr().err


def test_a_dry_run_finds_what_would_stop_the_run_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run_dir = tmp_path / "train.jsonl", tmp_path / "run"
    data.write_text('{"question": "1+1", "answer": "2"}\n')
    settings = {"data__train": data, "model__path": ROOT / "examples/tiny-adder"}
    assert main(arguments(run_dir, "--dry-run", **settings)) == 0
    shown = capsys.readouterr().out
    assert "1 rows" in shown and "| 1+1=<think>" in shown and not run_dir.exists()
    data.write_text('{"ask": "1+1"}\n')
    assert main(arguments(run_dir, "--dry-run", **settings)) == 65
    commit(run_dir, 3, 0, 0)
    (run_dir / RECORD).write_text(dump_config(config_of(run_dir, "seed=9")))
    assert main(arguments(run_dir, "--dry-run", **settings)) == 65
    said = capsys.readouterr().err
    assert "holds a run with other settings" in said and "\n    seed: 9 -> 1\n" in said
    assert "train.jsonl" in said, "one mistake hides no other"
    data.write_text('{"question": "1+1", "answer": "2"}\n')
    assert main(arguments(run_dir, "--dry-run", **settings)) == 70
    assert "the dry run found no other mistake" in capsys.readouterr().err
    assert main(arguments(run_dir, "--dry-run", "--fresh", **settings)) == 0
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoints", RECORD]


def test_the_record_names_a_local_model_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = config_of(tmp_path, "model.path=examples/tiny-adder")
    prepare_run_dir(config)
    assert recorded_config(tmp_path)["model"]["path"] == str(ROOT / "examples" / "tiny-adder")
    commit(tmp_path, 1, 0, 0)
    assert prepare_run_dir(config) == []
    (tmp_path / RECORD).write_text(dump_config(config))
    assert prepare_run_dir(config) == [], "a relative path is the same model"
    with pytest.raises(RunError, match=r"other settings \(model.path\)"):
        prepare_run_dir(config_of(tmp_path, "model.path=nobody/tiny-adder"))


def test_a_changed_setting_is_told_with_both_values(tmp_path: Path) -> None:
    prepare_run_dir(config_of(tmp_path, "optim.lr=1e-3"))
    commit(tmp_path, 1, 0, 0)
    with pytest.raises(RunError, match=r"\(optim.lr\):\n +optim.lr: 0.001 -> 0.01\nSet the old values"):
        prepare_run_dir(config_of(tmp_path, "optim.lr=1e-2"))
    with pytest.raises(RunError, match=r"loss.is_cap: null -> 2.0\n    optim.lr: 0.001 -> "):
        prepare_run_dir(config_of(tmp_path, "loss.is_cap=2.0"))


@pytest.mark.parametrize("name", [".", "..", ""])
def test_fresh_never_moves_the_folder_it_runs_in(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    config = config_of(run)
    prepare_run_dir(config)
    (run / "inside").mkdir()
    monkeypatch.chdir(run / "inside" if name == ".." else run)
    own = config.model_copy(update={"run_dir": name or str(run)})
    with pytest.raises(RunError, match="is or contains the current working folder"):
        prepare_run_dir(own, fresh=True)
    assert (run / RECORD).is_file()


def test_fresh_moves_the_folder_behind_a_link(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk" / "run", tmp_path / "run"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    prepare_run_dir(config_of(link))
    assert "moved the former run to" in prepare_run_dir(config_of(link), fresh=True)[0]
    assert link.is_symlink() and (disk / RECORD).is_file() and len(list(disk.parent.iterdir())) == 2


@pytest.mark.parametrize("place", ["file/run", "file", "/proc/1/x/y"])
def test_a_dry_run_tells_of_a_folder_that_cannot_be_made(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    run_dir = f"run_dir={tmp_path / place}"
    assert main(["train", str(ROOT / "examples/quickstart.toml"), "--dry-run", "--set", run_dir]) == 70
    assert "run_dir = " in capsys.readouterr().err


def test_a_dry_run_notes_what_this_machine_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    import torch

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    given = ["model.device=cuda", "rollout.engine=vllm", "dist.sequence_parallel=3", f"run_dir={tmp_path / 'run'}"]
    overrides = [part for each in given for part in ("--set", each)]
    assert main(["train", str(ROOT / "examples/quickstart.toml"), "--dry-run", *overrides]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert 'not here: model.device = "cuda"' in shown and "not here: dist.sequence_parallel = 3" in shown


def test_a_missing_hub_model_is_one_try_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from or1.core.errors import ModelSourceError
    from or1.model.source import require_source, require_tokenizer

    tries = []

    def unreachable(*args: object, **options: object) -> None:
        tries.append(args)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    overrides = ["--set", "model.path=nobody/no-such-model", "--set", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", str(ROOT / "examples/quickstart.toml"), "--dry-run", *overrides]) == 70
    said = capsys.readouterr().err
    assert len(tries) == 1 and "so a hub id, but huggingface.co cannot be reached (ConnectionError: no route)" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelSourceError, match="HF_HUB_OFFLINE is set"):
        require_source("nobody/no-such-model")
    with pytest.raises(ModelSourceError, match="holds no tokenizer"):
        require_tokenizer(str(tmp_path))


def test_a_place_that_may_not_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(_: object) -> int:
        raise PermissionError(13, "Permission denied", "/closed/run")

    monkeypatch.setattr("or1.commands.report.run", closed)
    assert main(["report", "/closed/run"]) == 70
    assert "'/closed/run' cannot be used (Permission denied)" in capsys.readouterr().err
