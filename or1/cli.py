"""The `or1` command: a table of verbs, the argument parser, and the place where errors become exit codes.

The verb `or1 X` is the module or1/commands/X.py. Verbs import torch and other heavy libraries in `run` only, so that
`or1 --help`, a bad argument and a bad config answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from or1 import __version__
from or1.commands import (
    ckpt,
    completion,
    data,
    demo,
    doctor,
    export,
    init,
    plan,
    replay,
    report,
    reward,
    schema,
    serve,
    show,
    train,
    tune,
    watch,
)
from or1.commands import eval as evaluate
from or1.commands import filter as measure
from or1.commands.arguments import Parser, set_in_two_words
from or1.commands.exit import explain_os_error, fail
from or1.core.errors import EXIT_INTERRUPTED, EXIT_USAGE, Or1Error
from or1.core.installed import require_kernels
from or1.core.terminal import guard_terminal, tell
from or1.dist.local_ranks import end_with_launcher


class Command(Protocol):
    """What every verb's module defines."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments to its parser."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the verb and return the exit code. Raises Or1Error."""
        ...


class Verb(NamedTuple):
    """One verb: its module, and its line in `or1 --help`."""

    command: Command
    help: str


VERBS = {
    "demo": Verb(demo, "train a tiny model on this CPU in a few minutes, to see what a run looks like"),
    "init": Verb(init, "write a folder with a config, a reward and data, for a task of your own"),
    "data": Verb(data, "download a published dataset and verify it, or build one checked file of several"),
    "train": Verb(train, "train from a TOML config; resumes a run that stopped"),
    "eval": Verb(evaluate, "avg@k and pass@k of a config, run, checkpoint or server; resumes"),
    "reward": Verb(reward, "grade reference answers, a wrong answer and a text of yours with the reward of a config"),
    "filter": Verb(measure, "measure how often a model solves each training prompt, or let judges vote; resumes"),
    "plan": Verb(plan, "predict memory and time of a config, and the largest packed row that fits"),
    "tune": Verb(tune, "measure which implementations are fastest here for the model of a config"),
    "report": Verb(report, "write report.html of a run: plots and sample transcripts; of several runs, a comparison"),
    "watch": Verb(watch, "write report.html again while a run continues, for a browser that renews it"),
    "show": Verb(show, "print responses of a run: prompt, text, reward, status, length"),
    "export": Verb(export, "write a checkpoint of a run as a Hugging Face model folder"),
    "replay": Verb(replay, "repeat one step of a run from its checkpoint and saved rollouts"),
    "ckpt": Verb(ckpt, "list, verify or remove checkpoints of a run"),
    "doctor": Verb(doctor, "check this machine and, with a config, that engine and trainer agree"),
    "schema": Verb(schema, "print the JSON schema of a config, for editors"),
    "completion": Verb(completion, "print a script that completes or1 commands in bash, zsh or fish"),
    "serve": Verb(serve, "run the vLLM server of a config, for a trainer on this or another machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. `argv` defaults to the arguments of this process."""
    if argv is None:
        end_with_launcher()
        guard_terminal()  # Only in a process of or1's own: this replaces hooks of the interpreter.
    if problem := set_in_two_words(sys.argv[1:] if argv is None else argv):
        return fail(problem, EXIT_USAGE)
    arguments = make_parser().parse_args(argv)
    # OpenMP reads this variable once, when torch is loaded. Threads that spin at barriers made a small model 30 times
    # slower as soon as another process wanted one of its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        require_kernels()
        return VERBS[arguments.verb].command.run(arguments)
    except Or1Error as error:
        return fail(error, error.exit_code)
    except OSError as error:
        if (explained := explain_os_error(error)) is None:
            raise
        return fail(*explained)
    except KeyboardInterrupt:
        tell("\nor1: interrupted")
        return EXIT_INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(prog="or1", description="RL training of reasoning models with verifiable rewards.")
    parser.add_argument("--version", action="version", version=f"or1 {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        verb.command.add_arguments(verbs.add_parser(name, help=verb.help))
    # For `or1 completion`, whose module must not import this one.
    parser.set_defaults(parser=parser)
    return parser
