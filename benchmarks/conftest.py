"""pytest benchmarks/ [--bench-out DIR]: collects rows, then prints the tables and writes JSON and a plot."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.lib import results

# As `or1` itself does: spinning threads distort every time on a machine that is not idle.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_ROWS = pytest.StashKey[dict[str, list[dict]]]()
_SKIPPED = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where results go."""
    parser.addoption(
        "--bench-out",
        default=os.environ.get("OR1_BENCH_OUT"),
        metavar="DIR",
        help="folder for head.json, score_rows.json, packing.json and head.png (default: "
        "$OR1_BENCH_OUT, or nothing is written)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Empty result lists."""
    config.stash[_ROWS], config.stash[_SKIPPED] = {}, {}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, dict], None]:
    """record(suite, row) adds a row to a suite's table."""
    return lambda suite, row: request.config.stash[_ROWS].setdefault(suite, []).append(row)


@pytest.fixture
def skip_variant(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """skip_variant(name, why) skips the test and names the variant in the summary."""

    def skip(name: str, why: str) -> None:
        request.config.stash[_SKIPPED][name] = why
        pytest.skip(f"{name}: {why}")

    return skip


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Tables at the end, files where they were asked for."""
    rows, skipped, out = config.stash[_ROWS], config.stash[_SKIPPED], config.getoption("--bench-out")
    if not rows and not skipped:
        return
    # Full width even without a terminal, so that a log holds whole rows.
    width = None if terminalreporter.isatty else 140
    console = Console(file=terminalreporter._tw._file, width=width)
    results.show_head(console, rows.get("head", ()), skipped)
    for suite, suite_rows in rows.items():
        if suite != "head":
            results.show_plain(console, suite, suite_rows)
    if out is not None:
        for suite, suite_rows in rows.items():
            console.print(f"wrote {results.write_json(Path(out) / f'{suite}.json', suite_rows)}", highlight=False)
        plot = results.plot_head(Path(out) / "head.png", rows.get("head", ()))
        if plot is not None:
            console.print(f"wrote {plot}", highlight=False)
