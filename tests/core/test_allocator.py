"""The GPU allocator's setting: made once, never over the user's, and for the trainer's process alone."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from or1.commands.train import _only_deterministic_algorithms, _set_allocator
from or1.core import allocator
from or1.rollout.vllm import setup

NAME = "PYTORCH_ALLOC_CONF"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (NAME, "PYTORCH_CUDA_ALLOC_CONF"):
        # Noted first, so that what the code under test sets is undone too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(allocator, "_ours", False)


def test_segments_grow_in_this_process_only() -> None:
    assert allocator.expand_segments()
    assert os.environ[NAME] == "expandable_segments:True"
    assert NAME not in allocator.users_environment(os.environ)
    assert not allocator.expand_segments(), "made already"


@pytest.mark.parametrize("name", [NAME, "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays_and_is_handed_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert not allocator.expand_segments()
    assert os.environ[name] == allocator.users_environment(os.environ)[name] == "max_split_size_mb:64"


@pytest.mark.parametrize(
    ("device", "engine", "placement", "installed", "expected"),
    [
        ("cuda", "hf", "colocate", "0.32.0", True),
        ("auto", "auto", "colocate", None, True),
        ("auto", "auto", "colocate", "0.32.0", False),
        ("cuda", "vllm", "colocate", "0.32.0", False),
        ("cuda", "vllm", "server", "0.32.0", True),
        ("cpu", "hf", "colocate", None, False),
    ],
)
def test_not_beside_a_vllm_that_sleeps_in_this_process(
    device: str, engine: str, placement: str, installed: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "installed_vllm", lambda: installed)
    rollout = SimpleNamespace(engine=engine, vllm=SimpleNamespace(placement=placement))
    _set_allocator(SimpleNamespace(model=SimpleNamespace(device=device), rollout=rollout))
    assert (NAME in os.environ) == expected


def test_deterministic_runs_do_not_fill_new_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, os.environ.get(name, "x"))
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    try:
        _only_deterministic_algorithms()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
        torch.backends.cudnn.benchmark = benchmark
