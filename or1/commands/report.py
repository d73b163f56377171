"""`or1 report`: the HTML page of a run, or of several runs over each other."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 report`."""
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run; several: compare")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write (default: report.html in the folder; of several runs, comparison.html beside the first)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print its path. Raises ReportError."""
    from or1.report.compare import write_comparison
    from or1.report.page import write_report

    first, *others = arguments.run_dirs
    path = write_comparison([first, *others], arguments.out) if others else write_report(first, out=arguments.out)
    print(path)
    return 0
