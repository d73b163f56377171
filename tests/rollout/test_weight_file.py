"""The file of a push: what safetensors reads from it, the room that it needs, and what happens without that room."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from or1.config import ModelConfig
from or1.core.errors import EngineError
from or1.model.export import named_weights
from or1.model.load import load_model
from or1.rollout.vllm import memory_folder, weight_file
from or1.rollout.vllm.memory_folder import MemoryFolder
from or1.rollout.vllm.push import FilePush
from or1.rollout.vllm.weight_file import _Layout, _Writer, file_bytes, write_weights
from tests.model.test_checkpointing import Recorder

# Odd sizes before wide types: the format allows no gaps, and readers want aligned tensors.
MIXED = {
    "b": torch.arange(5, dtype=torch.uint8),
    "a": torch.randn(3, 7, dtype=torch.bfloat16),
    "d": torch.randn(2, 3, dtype=torch.float64).t(),
    "c": torch.randn(()),
    "empty": torch.randn(0, 4),
    "flag": torch.tensor([True, False, True]),
}


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr(weight_file, "named_weights", lambda _: iter(MIXED.items()))
    monkeypatch.setattr(weight_file, "weight_forms", lambda _: [(n, t.dtype, t.shape) for n, t in MIXED.items()])
    return MIXED


def read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_holds(path: Path, tensors: dict[str, Tensor]) -> None:
    found = read(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_safetensors_reads_every_type_and_shape(mixed: dict[str, Tensor], tmp_path: Path) -> None:
    write_weights(tmp_path / "w", None)
    assert_holds(tmp_path / "w", mixed)
    assert (tmp_path / "w").stat().st_size == file_bytes(None)
    begins = _Layout.of(None).begins
    assert all(begins[name] % tensor.dtype.itemsize == 0 for name, tensor in mixed.items())


def test_a_tied_model_is_pushed_with_its_head(adder: Path, tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=str(adder), dtype="bfloat16", device="cpu"))
    assert model.config.tie_word_embeddings
    loaded: list[dict[str, Tensor]] = []
    push = FilePush(needs=file_bytes(model))
    for version in (1, 2):
        push.send(lambda *_, path, version: loaded.append(read(Path(path))) or [], model, version)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
    assert loaded[0].keys() == dict(named_weights(model)).keys()
    assert torch.equal(2 * loaded[0]["lm_head.weight"], loaded[1]["lm_head.weight"])
    assert torch.equal(loaded[1]["lm_head.weight"], loaded[1]["model.embed_tokens.weight"])
    assert [file.name for file in push.path.parent.iterdir()] == ["weights.safetensors"]
    push.close()


def test_a_copy_is_under_way_while_the_tensor_before_is_written(mixed: dict[str, Tensor], tmp_path: Path) -> None:
    layout, lane = _Layout.of(None), Recorder()
    with open(tmp_path / "w", "wb") as file:
        weight_file._write(file.fileno(), memoryview(layout.header), 0)
        writer = _Writer(file.fileno(), layout, lane)
        for name, tensor in mixed.items():
            writer.put(name, tensor)
        writer.finish()
    assert_holds(tmp_path / "w", mixed)
    count = len(mixed)
    expected = [("copy", 1), *(pair for i in range(2, count + 1) for pair in (("copy", i), ("finish", i - 1)))]
    assert lane.events == [*expected, ("finish", count)]
    assert [buffer.nbytes for buffer in writer._buffers] == [48, 48], "two of the largest tensor, exactly"


def test_a_full_disk_is_named_and_every_weight_is_still_gathered(
    mixed: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[str] = []

    def weights(_: object) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in mixed.items():
            gathered.append(name)
            yield name, tensor

    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_file, "named_weights", weights)
    monkeypatch.setattr(weight_file.os, "pwrite", pwrite)
    push = FilePush(tmp_path)
    with pytest.raises(EngineError, match=r"the weights take 0 MiB.*has room for [\d,]+ MiB.*--shm-size.*TMPDIR"):
        push.send(lambda *_, **__: [], None, 1)
    assert gathered == list(mixed)
    assert not list(tmp_path.iterdir()), "no half file is left"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the free bytes that each place claims, by its name; a test changes them."""
    free = {"shm": 64 << 20, "tmp": 1 << 30, "run": 100 << 30}
    for name in ("shm", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(memory_folder, "_SHARED_MEMORY", str(tmp_path / "shm"))
    monkeypatch.setattr(memory_folder.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    for module in (memory_folder, weight_file):
        monkeypatch.setattr(module, "free_bytes", lambda folder: free[folder.name])
    return free


@pytest.mark.parametrize(("needs", "expected"), [(0, "shm"), (64 << 20, "shm"), (65 << 20, "tmp"), (15 << 30, "run")])
def test_weights_go_to_the_first_place_with_room(
    needs: int, expected: str, places: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push = FilePush(needs=needs, spare=tmp_path / "run")
    assert push.path.parent.parent == tmp_path / expected
    told = capsys.readouterr().err
    if expected == "shm":
        assert not told
    else:
        assert f"{tmp_path / 'shm'} has 64 MiB and the weights take {needs / 2**20:,.0f}" in told
        assert f"they go to {tmp_path / expected}" in told and "--shm-size" in told
    push.close()
    assert not list((tmp_path / expected).iterdir())


def test_without_room_anywhere_the_error_has_the_numbers(places: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"take 204,800 MiB, and .*run has room for 102,400 MiB.*--shm-size"):
        FilePush(needs=200 << 30, spare=tmp_path / "run")


def test_what_a_killed_process_left_is_removed_before_the_room_is_asked_for(
    places: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan = tmp_path / "shm" / "or1-pushed-dead"
    orphan.mkdir()

    def free(folder: Path) -> int:
        return 0 if orphan.exists() else 1 << 30

    monkeypatch.setattr(memory_folder, "free_bytes", free)
    folder = MemoryFolder("or1-pushed-", needs=1 << 20)
    assert folder.path.parent == tmp_path / "shm" and not orphan.exists()
    folder.close()


def test_free_bytes_are_those_a_user_may_write(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    assert weight_file.free_bytes(tmp_path) == pytest.approx(found.f_bavail * found.f_frsize, rel=0.05)
