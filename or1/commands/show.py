"""`or1 show`: responses of a run in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

from or1.commands.arguments import positive

STATUSES = ("ok", "wrong", "no_answer", "truncated", "timeout", "crash", "skipped")
"""The values of or1.core.types.Status, without the seconds that its import takes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 show`."""
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("--step", type=positive, metavar="N", help="step whose responses are shown (default: newest)")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--best", dest="order", action="store_const", const="best", help="highest rewards first")
    order.add_argument("--worst", dest="order", action="store_const", const="worst", help="lowest rewards first")
    parser.add_argument("--status", choices=STATUSES, default="", help="only responses with this status; ok: rewarded")
    parser.add_argument(
        "--count", type=positive, default=4, metavar="N", help="largest number of responses (default 4)"
    )
    parser.add_argument("--full", action="store_true", help="do not shorten long texts")


def run(arguments: argparse.Namespace) -> int:
    """Print the responses. Raises ReportError."""
    from or1.report.samples import load_shown, print_shown

    a = arguments
    print_shown(load_shown(a.run_dir, a.step, a.order or "", a.status, a.count), a.full)
    return 0
