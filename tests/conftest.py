"""Fixtures of all tests: the repository, the example checkpoint, the or1 command. Two workers for the whole suite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WORKERS = 2

# As `or1` itself does: spinning threads would make every test that shares its cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Give the whole suite two workers, a file at a time; files that are named run in this process.

    -n overrides both, and so does what needs this process: --pdb, -s and --collect-only. benchmarks/ is not affected.
    """
    option = config.option
    whole = config.args_source is config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    alone = option.usepdb or option.capture == "no" or option.collectonly
    # None: xdist is there, and no -n was given.
    if whole and not alone and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist, option.loadscopereorder = WORKERS, "loadfile", False


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
