"""`or1 tune`: measure the candidates for the model of a config, and keep the choice for later runs."""

from __future__ import annotations

import argparse
import json

from or1.commands.arguments import add_overrides, positive
from or1.config.load import load_config
from or1.core.quiet import quiet_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 tune`."""
    parser.add_argument("config", help="TOML file; of its model only config.json is read, of its data nothing")
    add_overrides(parser)
    parser.add_argument(
        "--budget", type=positive, default=60, metavar="SECONDS", help="most seconds of all measurements (default: 60)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table and keep the choice. Raises ConfigError, ModelError, RunError."""
    config = load_config(arguments.config, arguments.overrides, files=False)
    quiet_libraries()
    from rich.console import Console

    from or1.report.progress import Bar
    from or1.report.tune_table import print_tuning
    from or1.tune import cache
    from or1.tune.run import measure

    # With --json standard output holds the result alone.
    with Bar(Console(stderr=True) if arguments.json else None, unit="seconds") as bar:
        record = measure(config, bar, float(arguments.budget), all_groups=True)
    if arguments.json:
        print(json.dumps(record.as_json(), indent=2))
    else:
        print_tuning(record, str(cache.file_of(record.key)))
    return 0
