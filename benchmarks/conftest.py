"""Plugin of `pytest benchmarks/ [--bench-out DIR] [--bench-real FILE]`: tables, JSON files and a plot of the rows."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.lib import results

# As in `or1`: spinning threads distort every time on a machine that is not idle.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_ROWS = pytest.StashKey[dict[str, list[dict]]]()
_SKIPPED = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --bench-out, the folder for results, and --bench-real, inputs of a real model."""
    parser.addoption(
        "--bench-real",
        type=Path,
        metavar="FILE",
        help="file of python -m benchmarks.real.make: the head runs on its sections too",
    )
    parser.addoption(
        "--bench-out",
        default=os.environ.get("OR1_BENCH_OUT"),
        metavar="DIR",
        help="folder for head.json, score_rows.json, packing.json and head.png (default: "
        "$OR1_BENCH_OUT, or nothing is written)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start with empty result lists."""
    config.stash[_ROWS], config.stash[_SKIPPED] = {}, {}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, dict], None]:
    """Return record(suite, row), which adds a row to a suite's table."""
    return lambda suite, row: request.config.stash[_ROWS].setdefault(suite, []).append(row)


@pytest.fixture
def skip_variant(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return skip_variant(name, why), which skips the test and lists the variant in the summary."""

    def skip(name: str, why: str) -> None:
        request.config.stash[_SKIPPED][name] = why
        pytest.skip(f"{name}: {why}")

    return skip


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables. Write files if --bench-out names a folder."""
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
