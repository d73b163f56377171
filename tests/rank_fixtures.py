"""Fixtures of the tests that start ranks; apart from rank_processes, which the ranks import too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_processes import stop_server


@pytest.fixture(scope="module", autouse=True)
def no_server_left() -> Iterator[None]:
    """The process that forks ranks ends with the module."""
    yield
    stop_server()
