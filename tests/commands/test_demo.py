"""`or1 demo`: from the installed package, in an empty folder, resumed by a second call."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
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


@pytest.mark.slow
def test_a_demo_trains_and_goes_on(root: Path, tmp_path: Path) -> None:
    packages = os.pathsep.join([str(root), str(root / "kernels")])
    first = demo(tmp_path, packages, 1)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "or1-demo" / "run" / "report.html").is_file()
    assert "or1 init my-task" in first.stdout
    again = demo(tmp_path, packages, 1)
    assert again.returncode == 0 and "2 of 2 steps" in again.stdout + again.stderr
    other = tmp_path / "other"
    (other / "or1-demo").mkdir(parents=True)
    (other / "or1-demo" / "x").write_text("")
    refused = demo(other, packages, 1)
    assert refused.returncode != 0 and "name another folder with --dir" in refused.stderr


@pytest.mark.nightly
@pytest.mark.timeout(700)
def test_a_wheel_holds_all_that_a_demo_needs(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    subprocess.run(["git", "clone", "-q", str(root), str(copy)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=copy, check=True, timeout=600)
    (wheel,) = tmp_path.glob("or1-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()
    done = demo(empty, str(tmp_path / "site"), 1)
    assert done.returncode == 0, done.stderr
