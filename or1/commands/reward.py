"""`or1 reward`: grade known texts with the reward of a config."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from or1.commands.arguments import add_overrides
from or1.config import Config
from or1.config.load import load_config
from or1.core.errors import DataError, ScorerError
from or1.core.quiet import quiet_libraries

if TYPE_CHECKING:
    from or1.reward.trial import Trial

_MOST_LINES = 40
"""Lines of a function's output that are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 reward`."""
    parser.add_argument("config", help="TOML file")
    parser.add_argument("--row", metavar="N", help="only this row: its number from 1, or its id, file:line")
    parser.add_argument("--text", metavar="FILE", help="also grade this text as a response; - reads standard input")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Grade and print. Raises ConfigError and what `try_reward` raises."""
    config = load_config(arguments.config, arguments.overrides)
    text = None if arguments.text is None else read_text(arguments.text)
    try_reward(config, arguments.row, text)
    return 0


def read_text(name: str) -> str:
    """Return the text of a file, or of standard input for "-". Raises DataError if the text cannot be read."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {name}: cannot be read ({error}); name a UTF-8 text file, or - for stdin") from error


def try_reward(config: Config, row: str | None = None, text: str | None = None) -> list[list[Trial]]:
    """Grade reference answers, a wrong answer and `text` for three rows, or for `row`, print and return the trials.

    Raises DataError for unusable data or no such row, ScorerError for a reward that does not start.
    """
    if config.environment.id:
        raise ScorerError("environment.id: the rewards are those of its episodes; `or1 reward` grades texts alone")
    quiet_libraries()
    from or1.data.problems import load_training_files
    from or1.model.load import load_tokenizer
    from or1.report.trial_table import print_trials
    from or1.reward import make_scorer
    from or1.reward.output import LOG_NAME
    from or1.reward.trial import Sample, choose_rows, samples_of, tried

    # Only functions read token ids, and the tokens of a large file take minutes.
    tokenizer = load_tokenizer(config.model.path) if config.reward.functions else None
    prompts = load_training_files(config, tokenizer).prompts
    rows = choose_rows(prompts, row)
    own = [] if text is None else [Sample("your text", text)]
    reward, graded = config.reward.model_copy(update={"workers": 1}), []
    with tempfile.TemporaryDirectory() as folder:
        with make_scorer(reward, rows, Path(folder)) as scorer:
            for prompt in rows:
                graded.append(list(tried(scorer, reward, prompt, samples_of(prompt, reward) + own, tokenizer)))
                print_trials(prompt, graded[-1])
        log = Path(folder) / LOG_NAME
        printed = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    _print_end(printed, graded)
    return graded


def _print_end(printed: Sequence[str], graded: Sequence[Sequence[Trial]]) -> None:
    """Print what the function printed, and a warning about references that a built-in verifier refuses."""
    from or1.core.text import visible

    if printed:
        print("\nprinted by the reward:")
        print("\n".join(visible(f"  | {line}") for line in printed[:_MOST_LINES]))
        if len(printed) > _MOST_LINES:
            print(f"  ... and {len(printed) - _MOST_LINES:,} more lines")
    refused = [trial for trials in graded for trial in trials if trial.sample.right and not trial.score.reward >= 1]
    if refused:
        print(
            f"\nwarning: {len(refused)} reference answers do not get a full reward; such rows teach the model that the "
            "right answer is wrong. Correct the rows, or choose another reward.kind"
        )
