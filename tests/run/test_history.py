"""What a run does when a part of its own folder was lost or damaged: a line and a way on, never a start from 0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from or1.cli import main
from or1.core.errors import MetricsError, RunError
from or1.core.files import SEAL, is_unbroken, sealed
from or1.run.checkpoint import Checkpoint, load_latest, verify_checkpoint
from or1.run.checkpoint_writer import save_checkpoint
from or1.run.directory import row_cap
from or1.run.marks import lost_history, lost_newest, mark_commit
from or1.run.metrics_log import MetricsWriter, read_metrics, rewind_metrics
from tests.helpers.small_run import ROOT, arguments, lines

TINY = {"stage__0__steps": 2, "stage__1__steps": 1}
LONGER = TINY | {"stage__1__steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of three steps with a checkpoint of each."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(run_dir, **TINY)) == 0
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def edit(path: Path, change: dict[str, Any], seal: bool = False) -> None:
    """Change values of a manifest by dotted name; `seal` leaves it as an or1 without seals would have written it."""
    manifest = json.loads(path.read_text())
    for name, value in change.items():
        *outer, last = name.split(".")
        place = manifest
        for key in outer:
            place = place[key]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
    if seal:
        manifest.pop(SEAL, None)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("how", ["removed", "renamed", "manifests"])
@pytest.mark.parametrize("old", [False, True])
def test_lost_checkpoints_are_told_and_the_history_stays(
    how: str, old: bool, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir / "checkpoints"
    if how == "removed":
        shutil.rmtree(folder)
    elif how == "renamed":
        folder.rename(run_dir / "checkpoints.bak")
    else:
        for path in folder.glob("step_*/manifest.json"):
            path.unlink()
    if old:
        (run_dir / ".marks.json").unlink()
    before = (run_dir / "metrics.jsonl").read_bytes()
    for flags in (["--dry-run"], []) if how != "manifests" else ([],):
        assert main(arguments(run_dir, *flags, **LONGER)) == 70
        said = capsys.readouterr().err
        assert "--fresh" in said and "checkpoints" in said
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert main(["ckpt", "verify", str(run_dir)]) == 70


def test_the_history_of_a_run_without_a_commit_yet_is_no_loss(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    assert lost_history(tmp_path, 5) == ""
    assert "did 2 steps" in lost_history(tmp_path, 2), "an older or1 left no marks"
    mark_commit(tmp_path, 0)
    assert lost_history(tmp_path, 2) == "", "the disk was full, and the run began without a checkpoint"
    mark_commit(tmp_path, 2)
    assert "had a checkpoint of step 2" in lost_history(tmp_path, 5)


def test_a_newest_checkpoint_that_is_gone_or_has_no_manifest_is_named(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "checkpoints" / "step_3" / "manifest.json").unlink()
    assert main(["ckpt", "verify", str(run_dir)]) == 70
    assert "step_3/manifest.json is missing" in capsys.readouterr().err
    assert main(["ckpt", "ls", str(run_dir)]) == 0 and main(["export", str(run_dir)]) == 70
    shutil.rmtree(run_dir / "checkpoints" / "step_3")
    capsys.readouterr()
    assert main(["ckpt", "verify", str(run_dir)]) == 70
    assert "has lost step_3" in capsys.readouterr().err
    assert main(arguments(run_dir, **TINY)) == 0
    said = capsys.readouterr().out
    assert "has lost step_3, the newest it had; the newest there is step_2" in said and "resumed after step 2" in said
    assert lost_newest(run_dir) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"state.sampler.cursor": 0},
        {"state.updates": 0},
        {"step": -1},
        {"step": 2},
        {"step": 40},
        {"state.watch": KeyError},
        {"state.odd": 1},
        {"odd": 1},
        {"state": []},
        {"state.updates": "x"},
        {"state.policy_version": None},
        {"state.inputs": None},
        {"state.budget.max_tokens": -5},
        {"tensors": {}},
    ],
)
def test_an_edited_manifest_falls_back_to_the_checkpoint_before(
    change: dict[str, Any], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run_dir / "checkpoints" / "step_3" / "manifest.json", change)
    assert main(["ckpt", "verify", str(run_dir)]) == 70
    assert "step_3/manifest.json does not have its own sha256" in capsys.readouterr().err
    latest, warnings = load_latest(run_dir / "checkpoints")
    assert latest is not None and latest.step == 2 and len(warnings) == 1


def test_a_copied_checkpoint_is_not_the_newest(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step_1", folder / "step_9")
    latest, warnings = load_latest(folder)
    assert latest is not None and latest.step == 3 and "is that of step 1" in warnings[0]


def test_a_checkpoint_of_an_older_or1_is_used_without_a_word(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, Checkpoint(4, {"step": 4}, {"w": torch.ones(2)}), keep=1)
    edit(path / "manifest.json", {}, seal=True)
    latest, warnings = load_latest(tmp_path)
    assert latest is not None and latest.step == 4 and not warnings and verify_checkpoint(path)["step"] == 4


def test_a_seal_is_of_the_content_and_not_of_its_layout() -> None:
    data = sealed({"b": 1, "a": {"y": 0.1, "x": [None, "\u00e9"]}})
    assert is_unbroken(json.loads(json.dumps(data, indent=3, sort_keys=True)))
    assert sealed(data) == data and not is_unbroken(data | {"b": 2}) and is_unbroken({"b": 1})


def test_files_that_systems_leave_in_a_checkpoint_do_not_matter(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, Checkpoint(4, {"step": 4}, {"w": torch.ones(2)}), keep=1)
    for name in (".DS_Store", ".nfs000000000012ab", "._manifest.json"):
        (path / name).write_bytes(b"x")
    (tmp_path / ".step_4.swp").write_text("an editor's")
    latest, warnings = load_latest(tmp_path)
    assert latest is not None and not warnings


def at(step: int, **more: object) -> str:
    return json.dumps({"step": step, "stage": 0, **more})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (at(0) + "\n" + at(1) + "\n\xff" + at(2) + "\n", "1 lines cannot be read"),
        (at(0) + "\n" + at(1)[:9] + "\n" + at(2) + "\n", "1 lines"),
        ("[1]\nnull\n" + at(0) + "\n", "2 lines"),
        ('{"stp": 1}\n' + at(0) + "\n", "1 lines"),
        ("\n\n", "no line of steps 0 to 2"),
        ("", "no line of steps 0 to 2"),
        (at(0) + "\n" + at(2) + "\n", "no line of steps 1;"),
        (at(0) + "\n" + at(1) + "\n" + at(2) + "\n" + at(2) + "\n", "steps 2 more than once"),
        ('{"step": true}\n' + at(0) + "\n", "1 lines"),
        ("[" * 100_000 + "\n" + at(0) + "\n", "1 lines"),
    ],
)
def test_damaged_metrics_are_put_aside_and_told(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text.encode("latin-1"))
    steps = [record["step"] for record in read_metrics(path)]
    kept, remarks = rewind_metrics(path, 2)
    assert told in "\n".join(remarks)
    assert steps == [record["step"] for record in kept] == [record["step"] for record in read_metrics(path)]
    assert not [remark for remark in rewind_metrics(path, 2)[1] if "no line" not in remark], "told once"
    if "lines" in told and "no line" not in told:
        assert (tmp_path / "metrics.jsonl.damaged").stat().st_size > 0


def test_a_metrics_line_that_was_changed_is_told(tmp_path: Path) -> None:
    for first in (0, 3):
        writer = MetricsWriter(tmp_path, tensorboard=False)
        for step in range(first, first + 3):
            writer.write(step, 0, {"reward/mean": 0.5})
        writer.close()
    path = tmp_path / "metrics.jsonl"
    assert rewind_metrics(path, 4)[1] == []
    path.write_text(path.read_text().replace('"step": 1, "stage": 0', '"step": 1, "stage": 4'))
    kept, remarks = rewind_metrics(path, 3)
    assert len(kept) == 4 and len(remarks) == 1 and "the lines of steps 1 are not as they were written" in remarks[0]


@pytest.mark.parametrize("how", ["removed", "replaced", "folder renamed"])
def test_metrics_taken_from_under_a_run_end_it(how: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writer = MetricsWriter(run_dir, tensorboard=False)
    writer.write(0, 0, {})
    if how == "folder renamed":
        run_dir.rename(tmp_path / "other")
    else:
        (run_dir / "metrics.jsonl").unlink()
    if how == "replaced":
        rewind_metrics(run_dir / "metrics.jsonl", 0)
    with pytest.raises(MetricsError, match="removed or replaced"):
        writer.write(1, 0, {})
    writer.close()


@pytest.mark.slow
def test_a_run_goes_on_with_damaged_metrics_and_replays(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_dir / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    # Lines that hold no record, and bytes that are no text at the start of the line of step 1.
    path.write_bytes(before[0] + b"null\n\n\xff\xfe" + b"".join(before[1:]))
    assert main(["replay", str(run_dir), "3"]) == 0
    assert main(arguments(run_dir, **LONGER)) == 0
    assert {line["step"] for line in lines(run_dir)} >= {0, 2, 3, 4}


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "null",
        "{}",
        '"x"',
        '{"max_tokens": -3}',
        '{"max_tokens": true}',
        "\udcff",
        '{"max_tokens": 1.5}',
        '{"max_tokens": 0}',
    ],
)
def test_a_damaged_row_cap_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "row_tokens.json").write_text(text, errors="surrogateescape")
    with pytest.raises(RunError, match="remove it"):
        row_cap(tmp_path)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", ".metrics.jsonl.partial", "config.resolved.json"])
def test_a_folder_in_a_files_place_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).mkdir()
    assert main(arguments(tmp_path)) == 70
    assert f"{tmp_path / name} is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rollouts", "weights", "tensorboard", "checkpoints"])
def test_a_file_in_a_folders_place_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("")
    assert main(arguments(tmp_path)) == 70
    assert f"{tmp_path / name} is a file" in capsys.readouterr().err


def test_a_run_is_its_folder_by_whatever_path(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(run_dir)
    for place in ("run", "run/", "link", tmp_path / "." / "link"):
        assert main(arguments(place, "--dry-run", **TINY)) == 0, capsys.readouterr().err
    run_dir.rename(tmp_path / "moved")
    assert main(arguments("moved", "--dry-run", **TINY)) == 0


def test_fresh_through_a_link_leaves_the_link(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from or1.config.load import load_config
    from or1.run.directory import prepare_run_dir

    (tmp_path / "link").symlink_to(run_dir)
    root = ROOT / "examples/quickstart.toml"
    linked = load_config(root, [f"run_dir={tmp_path / 'link'}"], files=False)
    assert "moved the former run" in prepare_run_dir(linked, fresh=True)[0]
    assert (tmp_path / "link").is_symlink() and (run_dir / "config.resolved.json").is_file()
    assert not (run_dir / "checkpoints").exists() and len(list(tmp_path.glob("run.*/checkpoints"))) == 1
    monkeypatch.chdir(run_dir)
    with pytest.raises(RunError, match="is or contains the current working folder"):
        prepare_run_dir(load_config(root, ["run_dir=."], files=False), fresh=True)


def test_a_record_that_was_changed_is_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run_dir / "config.resolved.json"
    text = record.read_text()
    record.write_text(text.replace('"seed": 1', '"seed": 8'))
    assert record.read_text() != text
    for command in (["export", str(run_dir)], ["replay", str(run_dir), "1"], ["eval", str(run_dir)]):
        assert main(command) in (2, 70)
        assert "was changed since the run wrote it" in capsys.readouterr().err
    assert main(arguments(run_dir, "--dry-run", **TINY)) == 70
    assert "was changed since the run wrote it" in capsys.readouterr().err
    record.unlink()
    assert main(arguments(run_dir, "--dry-run", **TINY)) == 0, "what the remedy says"


def test_exported_weights_that_were_damaged_are_exported_anew(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from or1.eval.target import resolve_target
    from or1.model.seal import export_problem

    folder = run_dir / "weights" / "step_3"
    assert export_problem(folder) == ""
    data = (folder / "model.safetensors").read_bytes()
    sets = f'eval.sets=[{{name="a", path="{ROOT}/examples/tiny-adder/heldout.jsonl", samples=1}}]'
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:100], b""):
        (folder / "model.safetensors").write_bytes(damaged)
        assert "model.safetensors was altered" in export_problem(folder)
        assert resolve_target(str(run_dir), None, [sets], None).config.model.path == str(folder)
        assert "exported anew" in capsys.readouterr().err
        assert (folder / "model.safetensors").read_bytes() == data
    (folder / "model.safetensors").write_bytes(b"")
    shutil.rmtree(run_dir / "checkpoints" / "step_3")
    assert main(["eval", str(run_dir), "--set", sets]) == 2
    assert "has no checkpoint of step 3 any more" in capsys.readouterr().err
