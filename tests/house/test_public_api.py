"""The public interface stays as committed in public_api.txt; tests/e2e/test_train.py holds the run directory to it."""

from __future__ import annotations

from tests.helpers.public_api import OUT_OF_DATE, committed, public_api


def test_the_public_interface_is_the_committed_one() -> None:
    interface, _ = committed()
    assert public_api() == interface, OUT_OF_DATE
