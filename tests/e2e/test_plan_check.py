"""The command that holds `or1 plan` to a real update agrees with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_plan_is_within_a_tenth_of_a_real_update(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.plan_check", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "plan_check.json").read_text())
    assert len(record["cases"]) >= 4 and all(abs(case["error"]) <= record["tolerance"] for case in record["cases"])
