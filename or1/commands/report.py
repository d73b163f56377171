"""`or1 report`: the HTML page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 report`."""
    parser.add_argument("run_dir", type=Path, help="run directory")


def run(arguments: argparse.Namespace) -> int:
    """Write report.html and print its path. Raises ReportError."""
    from or1.report.page import write_report

    print(write_report(arguments.run_dir))
    return 0
