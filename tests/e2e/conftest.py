"""Fixtures of these tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ranks import start_or1


@pytest.fixture(scope="module")
def quick_or1(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `or1 ARGS...` in a process that starts with torch loaded."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        log = tmp_path_factory.mktemp("or1") / "log"
        process = start_or1(arguments, root, log)
        process.join(600)
        assert process.exitcode is not None, f"or1 {' '.join(arguments)} takes more than 600 s"
        out, err = (Path(f"{log}.{kind}").read_text() for kind in ("out", "err"))
        return subprocess.CompletedProcess(arguments, process.exitcode, out, err)

    return run
