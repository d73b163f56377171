"""or1 refuses a package or1_kernels of another version, and says how to get its own back."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

import or1
import or1_kernels
from or1 import cli
from or1.core import installed
from or1.core.errors import EXIT_RUN, RunError


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the __init__.py that is found as or1_kernels."""
    file = tmp_path / "or1_kernels" / "__init__.py"
    file.parent.mkdir()
    spec = importlib.util.spec_from_file_location("or1_kernels", file)
    monkeypatch.setattr(installed, "find_spec", lambda name: spec)
    return file


def test_the_clone_holds_one_version() -> None:
    installed.require_kernels()
    assert or1.__version__ == or1_kernels.__version__


def test_the_two_distributions_agree_on_what_they_share(root: Path) -> None:
    whole, kernels = (
        tomllib.loads((root / folder / "pyproject.toml").read_text(encoding="utf-8")) for folder in (".", "kernels")
    )
    assert set(kernels["project"]["dependencies"]) < set(whole["project"]["dependencies"])
    for extra, needs in kernels["project"]["optional-dependencies"].items():
        assert needs == whole["project"]["optional-dependencies"][extra]
    for key in ("requires-python", "license", "authors", "urls"):
        assert kernels["project"][key] == whole["project"][key]
    for flag in ("-O3", "-fno-math-errno", "cxx_std=17", "extra_link_args=[", "sorted(glob("):
        lines = [
            [
                line.strip()
                for line in (root / folder / "setup.py").read_text().splitlines()
                if flag in line and "csrc" not in line
            ]
            for folder in (".", "kernels")
        ]
        assert lines[0] == lines[1], flag


@pytest.mark.parametrize("text", ['__version__ = "0.0.9"\n', "x = 1\n"])
def test_kernels_of_another_version_are_refused(text: str, kernels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels.write_text(text)
    assert cli.main(["schema"]) == EXIT_RUN
    said = capsys.readouterr().err
    assert f"or1 is {or1.__version__}, but the package or1_kernels in {kernels.parent} is" in said
    assert "pip uninstall or1-kernels" in said and ("of version 0.0.9" in said or "without a version" in said)


def test_missing_kernels_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"or1_kernels is missing.*--force-reinstall"):
        installed.require_kernels()


def test_the_check_loads_nothing(kernels: Path) -> None:
    kernels.write_text(f'__version__ = "{or1.__version__}"\nraise ImportError("was run")\n')
    before = set(sys.modules)
    installed.require_kernels()
    assert set(sys.modules) == before
