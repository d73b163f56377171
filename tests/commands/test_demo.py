"""`or1 demo`: in an empty folder, resumed by a second call. .ci/doors runs a wheel's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from or1.commands.examples import examples_folder


def demo(folder: Path, packages: str, steps: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "or1", "demo", "--steps", str(steps)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_examples_are_found(root: Path) -> None:
    assert examples_folder() == root / "examples"


# .ci/doors runs the demo of the wheel.
@pytest.mark.slow
@pytest.mark.nightly
def test_a_demo_trains_and_goes_on(root: Path, tmp_path: Path) -> None:
    packages = os.pathsep.join([str(root), str(root / "kernels")])
    first = demo(tmp_path, packages, 1)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "or1-demo" / "run" / "report.html").is_file()
    assert "or1 init my-task" in first.stdout
    config = (tmp_path / "or1-demo" / "quickstart.toml").read_text(encoding="utf-8")
    assert config.startswith("#:schema ./config.schema.json\n")
    assert (tmp_path / "or1-demo" / "config.schema.json").read_bytes() == (
        root / "examples/config.schema.json"
    ).read_bytes()
    again = demo(tmp_path, packages, 1)
    assert again.returncode == 0 and "2 of 2 steps" in again.stdout + again.stderr
    other = tmp_path / "other"
    (other / "or1-demo").mkdir(parents=True)
    (other / "or1-demo" / "x").write_text("")
    refused = demo(other, packages, 1)
    assert refused.returncode != 0 and "name another folder with --dir" in refused.stderr
