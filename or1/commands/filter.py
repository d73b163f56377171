"""`or1 filter`: how often a model solves each training prompt, or what judges say about it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from or1.commands.arguments import add_sampling_options
from or1.config import Config
from or1.config.load import load_config
from or1.core.errors import DataError
from or1.core.quiet import quiet_libraries
from or1.report.progress import Bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 filter`."""
    parser.add_argument("config", help="TOML file")
    parser.add_argument("--server", metavar="URL", help="sample from this server (sets endpoint.url)")
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="URL",
        help="let the model of this server vote on each problem (sets judge.url; may be repeated)",
    )
    add_sampling_options(parser, "parquet file to write (default: difficulty.parquet, or judged.parquet, in run_dir)")


def run(arguments: argparse.Namespace) -> int:
    """Measure the difficulty of the training prompts, or judge them. Raises ConfigError and what the two raise."""
    if arguments.judge and arguments.server:
        raise DataError("--server measures difficulty and --judge asks judges; give one of them")
    if arguments.judge:
        urls = [f"judge.url={json.dumps(arguments.judge)}"]
        config = load_config(arguments.config, [*urls, *arguments.overrides], "judge")
        run_judges(config, arguments.out, arguments.fresh)
        return 0
    server = [f'endpoint.url="{arguments.server}"'] if arguments.server else []
    config = load_config(arguments.config, [*server, *arguments.overrides], "filter")
    run_filter(config, arguments.out, arguments.fresh)
    return 0


def run_judges(config: Config, out: Path | None = None, fresh: bool = False) -> Path:
    """Let the judges of `[judge]` vote on every problem of `[data]`, and return the path of the parquet file.

    out  file to write; default: judged.parquet in the run directory

    Raises DataError, StoreError, EndpointError.
    """
    quiet_libraries()
    from or1.eval.judges import judge_problems, judged_lines

    out = out or config.run_path / "judged.parquet"
    with Bar(unit="votes") as bar:
        found = judge_problems(config, out, bar, fresh)
        for line in judged_lines(found, config.judge, out):
            bar.message(line)
    return out


def run_filter(config: Config, out: Path | None = None, fresh: bool = False) -> Path:
    """Measure every prompt of `[data]`, print the distribution, and return the path of the parquet file.

    out  file to write; default: difficulty.parquet in the run directory

    Raises DataError, StoreError, ModelError, EndpointError, ScorerError.
    """
    # First: transformers and its hub library read the settings when they are imported.
    quiet_libraries()
    from or1.eval.difficulty import measure_difficulty
    from or1.report.tables import print_difficulty

    out = out or config.run_path / "difficulty.parquet"
    with Bar() as bar:
        found = measure_difficulty(config, out, bar, fresh)
    lines = [
        f"  {found.truncated:,} of {found.responses:,} responses truncated, {found.failed:,} timed out or crashed the "
        "verifier",
        f"results: {out}",
        f'use it with: [data] difficulty_file = "{out}", keep_difficulty = [1, {config.filter.samples - 1}]',
    ]
    print_difficulty(found.solved, config.data.keep_difficulty, lines)
    return out
