"""Makes the helpers of these tests importable, here and in the processes they start."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    sys.path.insert(0, str(folder))

import pytest  # noqa: E402
from rank_processes import stop_server  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _no_server_left():
    yield
    stop_server()
