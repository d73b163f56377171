"""The `or1` command. Nothing heavy is imported before the arguments and the config are known to be good."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from or1 import __version__
from or1.commands.hints import Parser, set_in_two_words
from or1.config import Config
from or1.config.load import load_config
from or1.core.errors import ConfigError
from or1.core.files import NO_ROOM
from or1.core.terminal import guard_terminal, tell
from or1.dist.local_ranks import end_with_launcher

# A place that this user may not use, or that is of another kind than a run's.
_NOT_USABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
EXIT_USAGE, EXIT_DATA, EXIT_RUN, EXIT_RETRY, EXIT_INTERRUPTED = 2, 65, 70, 75, 130
_NO_ROOM = {
    errno.EDQUOT: "the disk quota is used up ({}); make room within it",
    errno.EFBIG: "a file may not grow further ({}); raise the limit (ulimit -f)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    if argv is None:
        end_with_launcher()
        guard_terminal()  # The process is or1's own, and so are its hooks.
    if problem := set_in_two_words(sys.argv[1:] if argv is None else argv):
        return _fail(problem, EXIT_USAGE)
    arguments = _parser().parse_args(argv)
    # OpenMP reads this once, when torch loads it. Threads that spin at barriers made a small model 30 times slower as
    # soon as another process wanted one of its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return arguments.run(arguments)
    except ConfigError as error:
        return _fail(error, EXIT_USAGE)
    except KeyboardInterrupt:
        tell("\nor1: interrupted")
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="or1", description="RL training of reasoning models with verifiable rewards.")
    parser.add_argument("--version", action="version", version=f"or1 {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    _add_train(verbs)

    evaluate = verbs.add_parser("eval", help="avg@k and pass@k of a config, run, checkpoint or server; resumes")
    evaluate.add_argument("target", help="TOML file, run directory, Hugging Face folder, or URL of a server")
    evaluate.add_argument("--config", dest="recipe", help="TOML file with [[eval.sets]], for a target without its own")
    evaluate.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    _add_sampling_options(evaluate, "folder for the results")
    evaluate.set_defaults(run=_evaluate)

    measure = verbs.add_parser("filter", help="measure how often a model solves each training prompt; resumes")
    measure.add_argument("config", help="TOML file")
    measure.add_argument("--server", metavar="URL", help="sample from this server (sets endpoint.url)")
    _add_sampling_options(measure, "parquet file to write (default: difficulty.parquet in run_dir)")
    measure.set_defaults(run=_filter)

    plan = verbs.add_parser("plan", help="predict memory and time of a config, and the largest packed row that fits")
    plan.add_argument("config", help="TOML file; the data files that it names need not exist")
    plan.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="override a value")
    plan.add_argument("--device", metavar="NAME", help="device to plan for, such as H200 (default: this machine's)")
    plan.add_argument("--gpus", type=_positive, default=1, metavar="N", help="GPUs that share the model (default: 1)")
    plan.add_argument(
        "--mean-response",
        type=_positive,
        metavar="TOKENS",
        help="mean response, for times (default: half of each stage's limit)",
    )
    plan.add_argument("--json", action="store_true", help="print the numbers as JSON")
    plan.set_defaults(run=_plan)

    report = verbs.add_parser("report", help="write report.html of a run: plots and sample transcripts")
    report.add_argument("run_dir", type=Path)
    report.set_defaults(run=_report)

    export = verbs.add_parser("export", help="write a checkpoint of a run as a Hugging Face model folder")
    export.add_argument("run_dir", type=Path)
    export.add_argument("--step", type=int, help="checkpoint to export (default: the newest)")
    export.add_argument("--out", type=Path, help="folder to write (default: RUN_DIR/weights/step_N)")
    export.set_defaults(run=_export)

    _add_checkpoint_verbs(verbs)
    doctor = verbs.add_parser("doctor", help="check this machine and, with a config, that engine and trainer agree")
    doctor.add_argument("config", nargs="?", help="TOML file whose engine to try, without any update")
    doctor.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="override it")
    doctor.set_defaults(run=_doctor)

    serve = verbs.add_parser("serve", help="run the vLLM server of a config, for a trainer on this or another machine")
    serve.add_argument("config", help="TOML file")
    serve.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="override a value")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; another than loopback only in a network that you trust",
    )
    serve.add_argument("--port", type=int, default=8000)
    serve.set_defaults(run=_serve)
    return parser


def _add_checkpoint_verbs(verbs: argparse._SubParsersAction) -> None:
    replay = verbs.add_parser("replay", help="repeat one step of a run from its checkpoint and saved rollouts")
    replay.add_argument("run_dir", type=Path)
    replay.add_argument("step", type=_positive)
    replay.set_defaults(run=_replay)

    checkpoints = verbs.add_parser("ckpt", help="list, verify or remove checkpoints of a run")
    actions = checkpoints.add_subparsers(required=True, metavar="ls|verify|prune")
    for name, text in (
        ("ls", "list them"),
        ("verify", "read every file and compare its sha256"),
        ("prune", "keep the newest that verify, remove the others"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("run_dir", type=Path)
        action.set_defaults(run=_checkpoints, action=name, step=None, keep=None)
        if name == "verify":
            action.add_argument("--step", type=_positive, help="this one only")
        if name == "prune":
            action.add_argument("--keep", type=_positive, required=True, metavar="N", help="how many to keep")


def _replay(arguments: argparse.Namespace) -> int:
    from or1.commands.replay import replay

    return _guarded(lambda: replay(arguments.run_dir, arguments.step))


def _checkpoints(arguments: argparse.Namespace) -> int:
    from or1.commands.ckpt import list_checkpoints, prune_checkpoints, verify_checkpoints

    match arguments.action:
        case "ls":
            return _guarded(lambda: list_checkpoints(arguments.run_dir))
        case "verify":
            return _guarded(lambda: verify_checkpoints(arguments.run_dir, arguments.step))
        case _:
            return _guarded(lambda: prune_checkpoints(arguments.run_dir, arguments.keep))


def _add_sampling_options(verb: argparse.ArgumentParser, out: str) -> None:
    verb.add_argument("--out", type=Path, help=out)
    verb.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="override a value")
    verb.add_argument("--fresh", action="store_true", help="move former results aside and start anew")


def _add_train(verbs: Any) -> None:
    train = verbs.add_parser("train", help="train from a TOML config; resumes a run that stopped")
    train.add_argument("config", help="TOML file")
    train.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="override a value")
    train.add_argument("--dry-run", action="store_true", help="check config, data and run_dir, show the plan, no more")
    train.add_argument("--fresh", action="store_true", help="move a former run in run_dir aside and start anew")
    train.add_argument("--nproc", type=_positive, metavar="N", help="ranks on this machine; calls torchrun")
    train.add_argument(
        "--restarts",
        type=_positive,
        default=0,
        metavar="N",
        help="start again after a crash or exit 75; give up after N in vain",
    )
    train.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    # Before the seconds that libraries take to load. Ranks that or1 starts, or torchrun, leave this line to others.
    if "RANK" not in os.environ:
        print(f"or1 {__version__}: reading {arguments.config}", flush=True)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from or1.commands.train import rehearse

        return _guarded(lambda: rehearse(config, fresh=arguments.fresh))
    if "RANK" in os.environ:
        if arguments.restarts:
            return _fail("--restarts is for ranks that or1 starts; use torchrun's --max-restarts", EXIT_USAGE)
    elif arguments.nproc is not None or arguments.restarts:
        return _train_in_processes(config, arguments)
    try:
        from or1.commands.train import launch

        return _guarded(lambda: launch(config, fresh=arguments.fresh))
    except KeyboardInterrupt:
        manifests = any(config.run_path.glob("checkpoints/step_*/manifest.json"))
        what = "resumes from the newest checkpoint" if manifests else "starts anew, since there is no checkpoint yet"
        tell(f"\nor1: interrupted; the same command {what}")
        return EXIT_INTERRUPTED


def _train_in_processes(config: Config, arguments: argparse.Namespace) -> int:
    from or1.commands.restarts import keep_running
    from or1.dist.local_ranks import run_ranks
    from or1.run.directory import checkpoints_of

    overrides = [part for override in arguments.overrides for part in ("--set", override)]

    def start(first: bool) -> int:
        fresh = ["--fresh"] * (arguments.fresh and first)
        return run_ranks(arguments.nproc or 1, ["train", arguments.config, *overrides, *fresh])

    if not arguments.restarts:
        return start(True)
    return keep_running(start, checkpoints_of(config.run_path), arguments.restarts)


def _evaluate(arguments: argparse.Namespace) -> int:
    from or1.eval.target import Target, resolve_target

    def action() -> None:
        target = resolve_target(arguments.target, arguments.recipe, arguments.overrides, arguments.step)
        from or1.commands.eval import run_evaluation

        run_evaluation(Target(target.config, arguments.out or target.out), arguments.fresh)

    return _guarded(action)


def _filter(arguments: argparse.Namespace) -> int:
    server = [f'endpoint.url="{arguments.server}"'] if arguments.server else []
    config = load_config(arguments.config, [*server, *arguments.overrides], "filter")
    from or1.commands.filter import run_filter

    return _guarded(lambda: run_filter(config, arguments.out, arguments.fresh))


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _plan(arguments: argparse.Namespace) -> int:
    from or1.core.errors import PlanError
    from or1.plan.devices import find_device
    from or1.plan.estimate import make_plan
    from or1.plan.shapes import shape_of
    from or1.plan.table import plan_json, print_plan_table, verdict

    config = load_config(arguments.config, arguments.overrides, files=False)
    try:
        shape = shape_of(config.model.path)
        device, why = find_device(arguments.device, config.model.device)
    except PlanError as error:
        return _fail(error, EXIT_USAGE)
    plan = make_plan(config, shape, device, arguments.gpus, arguments.mean_response)
    if arguments.json:
        print(json.dumps(plan_json(plan), indent=2))
    else:
        print_plan_table(plan, why)
    return 0 if plan.fits else _fail(verdict(plan), EXIT_RUN)


def _report(arguments: argparse.Namespace) -> int:
    from or1.report.page import write_report

    return _guarded(lambda: print(write_report(arguments.run_dir)))


def _export(arguments: argparse.Namespace) -> int:
    from or1.run.export import export_run

    return _guarded(lambda: print(export_run(arguments.run_dir, arguments.step, arguments.out)))


def _doctor(arguments: argparse.Namespace) -> int:
    from or1.commands.doctor import diagnose

    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    healthy = True

    def run() -> None:
        nonlocal healthy
        healthy = diagnose(config)

    return _guarded(run) or (0 if healthy else EXIT_RUN)


def _serve(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from or1.rollout import serve

    return _guarded(lambda: serve(config, arguments.host, arguments.port))


def _guarded(action: Callable[[], object]) -> int:
    """Run an action; or1's own errors, all ValueErrors with a remedy in the message, become one line and a code."""
    # By name, because their modules import torch.
    codes = {
        "DataError": EXIT_DATA,
        "DiskError": EXIT_RETRY,
        "ForeignFileError": EXIT_USAGE,
        "RewardFunctionError": EXIT_USAGE,
        "ServerLost": EXIT_RETRY,
        "ShorterRowsError": EXIT_RETRY,
    }
    try:
        action()
    except ConfigError:
        raise
    except ValueError as error:
        # Another library's ValueError has no remedy in it: its traceback is worth more than one line.
        if not type(error).__module__.startswith("or1"):
            raise
        return _fail(error, codes.get(type(error).__name__, EXIT_RUN))
    except OSError as error:
        if error.errno in NO_ROOM:
            remedy = _NO_ROOM.get(error.errno, "the disk is full ({}); make room")
            return _fail(remedy.format(error) + ", and the same command resumes", EXIT_RETRY)
        # One without a file is of something else than the user's folders, and its traceback is worth more.
        if error.filename is None:
            raise
        if error.errno in _NOT_USABLE:
            return _fail(
                f"{error.filename!r} cannot be used ({error.strerror}); correct that path or its rights, and "
                "repeat the command",
                EXIT_RUN,
            )
        return _fail(
            f"{error.filename!s} cannot be used ({error}); see what it is and who may read and write it, or "
            "choose another folder",
            EXIT_RUN,
        )
    return 0


def _fail(error: Exception | str, code: int) -> int:
    # What all ranks found alike is said once, in full; the watchdog passes on what only one found.
    rank, text = os.environ.get("RANK", "0"), str(error)
    first = text.partition("\n")[0]
    tell(f"or1: {text}" if rank == "0" else f"or1: rank {rank}: {first}")
    return code
