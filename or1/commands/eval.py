"""`or1 eval`: avg@k and pass@k of a config, run, checkpoint or server."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from or1.commands.arguments import add_sampling_options
from or1.core.quiet import quiet_libraries
from or1.report.progress import Bar

if TYPE_CHECKING:
    from or1.eval.target import Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 eval`."""
    parser.add_argument("target", help="TOML file, run directory, Hugging Face folder, or URL of a server")
    parser.add_argument("--config", dest="recipe", help="TOML file with [[eval.sets]], for a target without its own")
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    add_sampling_options(parser, "folder for the results")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate the target. Raises ConfigError and what `run_evaluation` raises."""
    from or1.eval.target import Target, resolve_target

    target = resolve_target(arguments.target, arguments.recipe, arguments.overrides, arguments.step)
    run_evaluation(Target(target.config, arguments.out or target.out), arguments.fresh)
    return 0


def run_evaluation(target: Target, fresh: bool = False) -> dict[str, Any]:
    """Evaluate every set of the config, print the tables, and return the contents of eval.json.

    Raises DataError, StoreError, ModelError, EndpointError, ScorerError.
    """
    # First: transformers and its hub library read the settings when they are imported.
    quiet_libraries()
    from or1.eval.evaluation import evaluate_target
    from or1.report.tables import print_evaluation

    with Bar() as bar:
        found = evaluate_target(target, bar, fresh)
    is_function = bool(target.config.reward.functions)
    remarks = [line for result in found.results if is_function and (line := result.remark())]
    where = f"results: {target.out / 'eval.json'}, transcripts: {target.out / 'transcripts'}"
    print_evaluation(found.results, found.sources, [*remarks, where])
    return found.report
