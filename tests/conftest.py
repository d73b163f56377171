"""Shared fixtures: the repository's root, tiny models made on the spot, and the or1 command as a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# As `or1` itself does: spinning threads would make every test that shares its cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def adder(root: Path) -> Path:
    """Return the folder of the example checkpoint."""
    return root / "examples" / "tiny-adder"


@pytest.fixture
def or1(root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `or1 ARGS...` from the repository and return the finished process."""

    def run(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "or1", *arguments], cwd=root, capture_output=True, text=True, timeout=timeout
        )

    return run
