"""Plugin of `pytest benchmarks/ [--bench-out DIR] [--bench-real FILE] [--bench-strict]`.

Prints a table a setting, the targets, what was not measured and why, and a sentence. Writes JSON files and a plot.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.lib import conclusion, load, measure, plots, results, tables

# As in `or1`: spinning threads distort every time on a machine that is not idle.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_ROWS = pytest.StashKey[dict[str, list[dict]]]()
_SKIPPED = pytest.StashKey[dict[str, str]]()
_BEGAN = pytest.StashKey[load.Probe]()
_TARGETS = "targets"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --bench-out, the folder for results; --bench-real, inputs of a real model; and --bench-strict."""
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
        help="folder for head.json, score_rows.json, packing.json, targets.json and head.png (default: "
        "$OR1_BENCH_OUT, or nothing is written)",
    )
    parser.addoption(
        "--bench-strict",
        action="store_true",
        help="fail for a missed target of time on a busy machine too, instead of reporting it as not judged",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start with empty result lists, and without the wide table of pytest-benchmark."""
    config.stash[_ROWS], config.stash[_SKIPPED] = {}, {}
    # Its plugin reads the option after this hook. --benchmark-verbose shows the table again.
    config.option.benchmark_quiet = True


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


@pytest.fixture(scope="session", autouse=True)
def _before_all(request: pytest.FixtureRequest) -> None:
    request.config.stash[_BEGAN] = load.probe()


@pytest.fixture
def hold(request: pytest.FixtureRequest) -> Callable[[Sequence[load.Target], Mapping[str, Sequence[float]]], None]:
    """Return hold(targets, repeats), which lists the targets in the summary and fails the test if one is missed.

    repeats: seconds of each round by name. A time that was missed on a busy machine skips the test instead.
    """
    before = load.probe()

    def judge(targets: Sequence[load.Target], repeats: Mapping[str, Sequence[float]]) -> None:
        busy = load.why_busy(before, load.probe(), repeats)
        rows = [target.row(busy, request.config.getoption("--bench-strict")) for target in targets]
        request.config.stash[_ROWS].setdefault(_TARGETS, []).extend(rows)
        settle(rows)

    return judge


def settle(rows: Sequence[dict]) -> None:
    """Fail the test if one of its targets was missed, else skip the test if one was not judged."""
    missed = [f"{r['target']}: {r['value']:.3g}, {conclusion.limit_of(r)}" for r in rows if r["verdict"] == load.MISSED]
    if missed:
        pytest.fail(f"missed {'; '.join(missed)}", pytrace=False)
    for r in rows:
        if r["verdict"] == load.NOT_JUDGED:
            pytest.skip(f"{load.NOT_JUDGED}: the machine was busy ({r['busy']})")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print tables, targets, reasons of skips and a conclusion. Write files if --bench-out names a folder."""
    rows, out = dict(config.stash[_ROWS]), config.getoption("--bench-out")
    skipped = config.stash[_SKIPPED] | _other_skips(terminalreporter, config.stash[_SKIPPED])
    if not rows and not skipped:
        return
    console = tables.console(terminalreporter._tw._file, terminal=terminalreporter.isatty)
    console.print()
    if out is not None:
        for suite, suite_rows in rows.items():
            console.print(f"wrote {results.write_json(Path(out) / f'{suite}.json', suite_rows)}", highlight=False)
        plot = plots.plot_head(Path(out) / "head.png", rows.get("head", ()))
        if plot is not None:
            console.print(f"wrote {plot}", highlight=False)
    head, targets = rows.pop("head", []), rows.pop(_TARGETS, [])
    console.print(f"{measure.device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}", style="dim")
    tables.show_head(console, head)
    for suite, suite_rows in rows.items():
        tables.show_plain(console, suite, suite_rows)
    tables.show_targets(console, targets)
    tables.show_skipped(console, skipped)
    began = config.stash.get(_BEGAN, None)
    busy = None if began is None or torch.cuda.is_available() else load.why_busy(began, load.probe())
    said = (conclusion.of_head(head, targets, busy), conclusion.of_packing(rows.get("packing", [])))
    for sentence in filter(None, said):
        console.print(f"\n{sentence}", highlight=False, style="bold")


def _other_skips(reporter: pytest.TerminalReporter, variants: Mapping[str, str]) -> dict[str, str]:
    """Return the reasons of skips that are not those of a variant, by the test's name."""
    known = {f"{name}: {why}" for name, why in variants.items()}
    found = {}
    for report in reporter.stats.get("skipped", []):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        # The table of targets has the reasons of those that were not judged.
        if reason not in known and not reason.startswith(load.NOT_JUDGED):
            found[report.nodeid.rsplit("::", 1)[-1]] = reason
    return found
