"""`or1 data NAME`: the files of a published dataset, ready for `data.train` and `[[eval.sets]]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from or1.config.published import PUBLISHED
from or1.core.quiet import quiet_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 data`."""
    parser.add_argument("name", nargs="?", choices=list(PUBLISHED), help="dataset; without it, the names are listed")
    parser.add_argument(
        "--out", type=Path, default=Path("data"), metavar="DIR", help="folder for the files (default: data)"
    )


def run(arguments: argparse.Namespace) -> int:
    """List the datasets, or write the files of one and verify those that are there. Raises DataError."""
    if arguments.name is None:
        _list()
        return 0
    # First: the hub's library reads the settings when it is imported.
    quiet_libraries()
    from or1.data.obtain import Got, obtain

    def done(got: Got) -> None:
        state = "" if got.is_new else ", verified"
        print(f"{got.path}: {got.entry['rows']:,} rows, sha256 {got.entry['sha256']}{state}", flush=True)

    obtain(arguments.name, PUBLISHED[arguments.name], arguments.out, done)
    print(f"sources and commits: {arguments.out / arguments.name}.manifest")
    return 0


def _list() -> None:
    for name, published in PUBLISHED.items():
        print(f"{name:14} {published.about}")
        for made in published.files:
            rows = "rows recorded at download" if made.rows is None else f"{made.rows:,} rows"
            print(f"{'':14}   {made.file}, {rows}")
