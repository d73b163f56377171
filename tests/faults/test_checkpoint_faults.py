"""Saves that a crash, a full disk or a stranger gets into; shards read by another number of ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from or1.cli import main
from or1.core import faults
from or1.core.errors import DiskError, ForeignFileError
from or1.run.checkpoint import Checkpoint, committed_steps, load_checkpoint, load_latest, verify_checkpoint
from or1.run.checkpoint_writer import CheckpointWriter, save_checkpoint
from tests.helpers import fault_work
from tests.helpers.ranks import or1_ranks, run_ranks
from tests.helpers.small_run import arguments, lines


def small_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"step": step}, {"master.w": torch.randn(7, 3), "step.w": torch.tensor(float(step))})


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("point", ["ckpt.after_shard:rank1", "ckpt.before_manifest:rank0", "ckpt.before_rename:rank0"])
def test_f02_a_rank_killed_before_the_commit_leaves_no_step(point: str, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = {"stage__0__steps": 2, "stage__1__steps": 1}
    codes = or1_ranks(2, arguments(run_dir, **settings), log, OR1_FAULT=f"{point}:step2:kill")
    assert -9 in codes and 0 not in codes
    assert committed_steps(run_dir / "checkpoints") == [1]
    assert list((run_dir / "checkpoints").glob(".step_2.partial"))
    assert or1_ranks(2, arguments(run_dir, **settings), log) == [0, 0]
    assert "resumed after step 1" in Path(f"{log}.0").read_text()
    assert committed_steps(run_dir / "checkpoints") == [1, 2, 3]
    assert not list((run_dir / "checkpoints").glob(".step_*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_f03_a_full_disk_keeps_the_old_checkpoint(small_disk: Path) -> None:
    save_checkpoint(small_disk, small_checkpoint(1), keep=2)
    writer = CheckpointWriter(small_disk, keep=2)
    writer.save(Checkpoint(2, {}, {"master.w": torch.zeros(2**20)}))
    with pytest.raises(DiskError, match=r"step_2 could not be written .*No space left.* 4,194,304 bytes.*free"):
        writer.wait()
    assert committed_steps(small_disk) == [1] and not list(small_disk.glob(".step_*"))
    assert load_latest(small_disk)[0].step == 1
    writer.save(small_checkpoint(3))
    writer.wait()
    assert committed_steps(small_disk) == [1, 3], "room that the failed save had taken is free again"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_save_is_reported_on_all_ranks_and_is_no_commit(rank: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_checkpoint(1), keep=2)
    fault = f"ckpt.before_shard:rank{rank}:step5:oom"
    for said, steps in run_ranks(fault_work.save_shards, 2, tmp_path, 2, timeout=30, OR1_FAULT=fault):
        assert f"step_5 could not be written on rank {rank} (OutOfMemoryError: out of memory" in said
        assert steps == [1] and not list(tmp_path.glob(".step_*"))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_f03_a_failed_checkpoint_is_skipped_and_only_the_last_is_required(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = {"stage__0__steps": 2, "stage__1__steps": 1}
    fault = "ckpt.before_shard:rank1:step2:enospc"
    assert or1_ranks(2, arguments(run_dir, **settings), log, OR1_FAULT=fault) == [0, 0]
    assert committed_steps(run_dir / "checkpoints") == [1, 3]
    assert "step_2 could not be written" in Path(f"{log}.0").read_text()
    assert load_checkpoint(run_dir / "checkpoints" / "step_3").state["totals"]["failed_checkpoints"] == 1
    assert [line["step"] for line in lines(run_dir)] == [0, 1, 2, 3]

    last = tmp_path / "last"
    fault = "ckpt.before_shard:rank0:step3:enospc"
    assert or1_ranks(2, arguments(last, **settings), log, OR1_FAULT=fault) == [75, 75]
    # The older one has made room for a second try, which failed too; the newest that verifies stays.
    assert committed_steps(last / "checkpoints") == [2]


@pytest.mark.timeout(200)
def test_shards_are_read_by_any_number_of_ranks_and_damage_is_seen_by_all(tmp_path: Path) -> None:
    run_ranks(fault_work.write_shards, 4, tmp_path, 4)
    path = tmp_path / "step_5"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *(f"shard_{r}.safetensors" for r in range(4))]
    whole = torch.arange(21.0).reshape(7, 3)
    assert load_checkpoint(path).tensors["master.w"].equal(whole)
    for size in (2, 3):
        parts = run_ranks(fault_work.read_shards, size, tmp_path)
        assert [row for part in parts for row in part[1]] == whole.tolist()
        assert all(part[0] == 5 and part[2] == 5.0 and not part[3] for part in parts)
    save_checkpoint(tmp_path, small_checkpoint(9), keep=3)
    data = bytearray((tmp_path / "step_9" / "shard_0.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "step_9" / "shard_0.safetensors").write_bytes(data)
    parts = run_ranks(fault_work.read_shards, 2, tmp_path)
    assert all(part[0] == 5 and "shard_0.safetensors does not have the sha256" in part[3][0] for part in parts)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seen", [((1,), (1, 2)), ((1, 2), (1,))])
def test_ranks_that_see_different_checkpoints_take_the_same_one(seen: tuple, tmp_path: Path) -> None:
    for rank, steps in enumerate(seen):
        for step in steps:
            save_checkpoint(tmp_path / str(rank), small_checkpoint(step), keep=3)
    parts = run_ranks(fault_work.read_shards_of_own_folder, 2, tmp_path, timeout=50)
    assert [part[0] for part in parts] == [part[2] for part in parts] == [1, 1], "the newest that all can read"
    assert parts[0][3] == parts[1][3], "the same warnings too"


@pytest.mark.parametrize("name", [".metadata", "optim.pt", "sub/pytorch_model.bin"])
def test_f06_a_file_that_or1_did_not_write_is_named_and_never_opened(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, canary = tmp_path / "run", tmp_path / "canary"
    newest = save_checkpoint(run_dir / "checkpoints", small_checkpoint(1), keep=2)
    (newest / name).parent.mkdir(exist_ok=True)
    # What unpickling would execute: os.system("touch canary").
    (newest / name).write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(ForeignFileError, match=Path(name).name):
        load_latest(run_dir / "checkpoints")
    assert main(["ckpt", "verify", str(run_dir)]) == 2
    assert Path(name).name in capsys.readouterr().err and not canary.exists()


def test_ckpt_lists_verifies_and_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        save_checkpoint(folder, small_checkpoint(step), keep=9)
    assert main(["ckpt", "ls", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["1", "2", "3", "4"]
    (folder / "step_4" / "shard_0.safetensors").write_bytes(b"cut")
    assert main(["ckpt", "verify", str(tmp_path)]) == 70
    assert "step_4/shard_0.safetensors has 3 bytes" in capsys.readouterr().err
    assert main(["ckpt", "verify", str(tmp_path), "--step", "3"]) == 0
    assert main(["ckpt", "prune", str(tmp_path), "--keep", "2"]) == 0
    assert committed_steps(folder) == [2, 3, 4], "the damaged one stays for a person to look at"
    assert main(["ckpt", "prune", str(tmp_path), "--keep", "3"]) == 70
    assert committed_steps(folder) == [2, 3, 4]
    assert main(["ckpt", "ls", str(tmp_path / "none")]) == 70
    assert verify_checkpoint(folder / "step_2")["step"] == 2


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    tensors = {"master.w": torch.randn(2**22)}
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(Checkpoint(1, {}, tensors))
    assert committed_steps(tmp_path) == [], "16 MiB are not written, hashed and flushed when save returns"
    kept = tensors["master.w"].clone()
    tensors["master.w"].zero_()
    writer.wait()
    assert load_checkpoint(tmp_path / "step_1").tensors["master.w"].equal(kept)


def test_the_faults_are_none_without_the_variable() -> None:
    assert faults._FAULTS is None and faults.hit("ckpt.after_shard", 1) is None
    with pytest.raises(faults.FaultError, match="point:rankR:stepS:action"):
        faults._parse("ckpt.after_shard:kill")


@pytest.mark.parametrize("plant", ["pickled weights", "config.json", "tokenizer_config.json"])
def test_f06_a_model_folder_that_would_run_code_is_refused_with_exit_2(
    plant: str, adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(adder, model)
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    if plant == "pickled weights":
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
        named = "pytorch_model.bin"
    else:
        path = model / plant
        settings = json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "evil.E", "AutoTokenizer": "evil.E"}}
        path.write_text(json.dumps(settings))
        named = plant
    assert main(arguments(tmp_path / "run", model__path=model)) == 2
    assert named in capsys.readouterr().err
    assert not canary.exists() and not (tmp_path / "run").exists()
