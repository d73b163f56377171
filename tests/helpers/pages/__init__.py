"""Reference pages of docs/ that are made from the code: `python -m tests.helpers.pages` writes them anew."""

from __future__ import annotations

from collections.abc import Callable

from tests.helpers.pages import api, cli, exit_codes
from tests.helpers.small_run import ROOT

COMMAND = "python -m tests.helpers.pages"
PAGES: dict[str, Callable[[], str]] = {"api.md": api.page, "cli.md": cli.page, "exit-codes.md": exit_codes.page}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
