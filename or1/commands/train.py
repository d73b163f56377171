"""`or1 train`: from a checked config to a finished run with exported weights, a report and a summary."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from or1 import __version__
from or1.commands.arguments import add_job_limits, add_overrides, positive
from or1.commands.dry_run import missing_here, require_place, warn_of_limits
from or1.commands.exit import fail
from or1.commands.restarts import Restarts
from or1.commands.stop_request import StopRequest
from or1.config import Config
from or1.config.load import load_config
from or1.config.root import TIME
from or1.core.errors import EXIT_INTERRUPTED, EXIT_USAGE, RunError
from or1.core.quiet import quiet_libraries
from or1.core.terminal import tell
from or1.core.text import visible
from or1.report.run_plan import print_plan
from or1.run.lock import RunLock

if TYPE_CHECKING:
    from or1.data import Problems
    from or1.dist.world import World
    from or1.report.rank_display import RankDisplay
    from or1.train.build import Parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 train`."""
    parser.add_argument("config", help="TOML file")
    add_overrides(parser)
    add_job_limits(parser)
    parser.add_argument("--dry-run", action="store_true", help="only check config, data and run_dir, and show the plan")
    parser.add_argument(
        "--fresh", action="store_true", help="move an earlier run in run_dir aside and start from scratch"
    )
    parser.add_argument("--no-tune", action="store_true", help='measure nothing before the first update: tune = "off"')
    parser.add_argument("--nproc", type=positive, metavar="N", help="ranks on this machine; calls torchrun")
    parser.add_argument(
        "--restarts",
        type=positive,
        default=0,
        metavar="N",
        help="start again after a crash or exit 75; stop after N restarts without a new checkpoint",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, or check the config with --dry-run. Raises what `launch` and `rehearse` raise, and ConfigError."""
    # Printed before the seconds that libraries take to load. The launcher prints this line once for all ranks.
    if "RANK" not in os.environ:
        print(f"or1 {__version__}: reading {arguments.config}", flush=True)
    if arguments.no_tune:
        # As a setting, so that ranks which this process starts get it too.
        arguments.overrides = [*arguments.overrides, "tune=off"]
    config = _named(load_config(arguments.config, arguments.overrides), arguments)
    if arguments.dry_run:
        rehearse(config, fresh=arguments.fresh)
        warn_of_limits(config, arguments.nproc, arguments.job_hours, arguments.grace_s)
        return 0
    if "RANK" in os.environ:
        if arguments.restarts:
            return fail("--restarts is for ranks that or1 starts; use torchrun's --max-restarts", EXIT_USAGE)
    elif arguments.nproc is not None or arguments.restarts:
        return _train_in_processes(config, arguments)
    try:
        launch(config, fresh=arguments.fresh)
    except KeyboardInterrupt:
        what = _next_start(config)
        tell(f"\nor1: interrupted; the same command {what}")
        return EXIT_INTERRUPTED
    return 0


def _next_start(config: Config) -> str:
    """Return what the command of an interrupted run does when it is started again."""
    folders = [each.parent.name for each in config.run_path.glob("checkpoints/step_*/manifest.json")]
    # A folder that was half written has a longer name.
    steps = [int(number) for name in folders if (number := name.removeprefix("step_")).isdecimal()]
    if not steps:
        return "starts anew, since there is no checkpoint yet"
    return f"resumes after step {max(steps)}, the newest checkpoint (SIGTERM would have kept all steps)"


def _named(config: Config, arguments: argparse.Namespace) -> Config:
    """Return the config with the folder of the run filled in; ranks that this process starts get the same folder."""
    if TIME not in config.run_dir:
        return config
    from or1.run.naming import named

    config, line = named(config, arguments.fresh, claim=not arguments.dry_run)
    print(visible(line), flush=True)
    arguments.overrides = [*arguments.overrides, f"run_dir={json.dumps(config.run_dir, ensure_ascii=False)}"]
    return config


def _train_in_processes(config: Config, arguments: argparse.Namespace) -> int:
    """Train in ranks of this machine, with --restarts again and again, and return the exit code."""
    from or1.dist.local_ranks import run_ranks
    from or1.run.directory import checkpoints_of

    overrides = [part for override in arguments.overrides for part in ("--set", override)]
    command = ["train", arguments.config, *overrides]
    nproc = arguments.nproc or 1
    code = run_ranks(nproc, [*command, "--fresh"] if arguments.fresh else command)
    if arguments.restarts:
        restarts = Restarts(checkpoints_of(config.run_path), arguments.restarts)
        while restarts.again(code):
            code = run_ranks(nproc, command)
    return code


def launch(config: Config, fresh: bool = False) -> None:
    """Train, then export the weights and write the report; in every rank that torchrun started.

    Raises RunError, DataError, ModelError, ScorerError, CheckpointError, DistError, DiskError; an error of one rank
    ends all ranks.
    """
    # Before torch is imported, which reads the variable once.
    _set_allocator(config)
    if TIME in config.run_dir:
        from or1.run.naming import named

        config = named(config, fresh, claim=True).config
    lock = RunLock(config.run_path)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # Before the model libraries are imported, so that a folder that cannot be used is reported at once.
        messages = _prepare(config, fresh, lock)
    quiet_libraries()
    if config.deterministic:
        _only_deterministic_algorithms()
    from or1.dist.watchdog import watched
    from or1.dist.world import join
    from or1.model.load import remarks_of, resolve_device
    from or1.report.live import RunDisplay
    from or1.report.rank_display import RankDisplay
    from or1.run.message_log import RunLog, logged
    from or1.run.starts import command_of, note_start, start_record
    from or1.train.build import build
    from or1.trainer import Trainer

    with (
        join(config.dist, resolve_device(config.model.device)) as world,
        watched(world, config.dist.heartbeat_timeout_s) as watchdog,
        StopRequest() as stop,
        contextlib.closing(lock),
    ):
        if world.size > 1:
            messages = _prepare_together(world, config, fresh, lock)
        with contextlib.ExitStack() as stack:
            shown = stack.enter_context(RunDisplay(config.total_steps, config.stage)) if world.is_main else None
            log = RunLog(config.run_path) if world.is_main else None
            stack.enter_context(logged(log))
            display = RankDisplay(watchdog, shown, log)
            if log is not None:
                note_start(config.run_path, start := start_record(world.size))
                log.write(f"or1 {start['or1']} started: {command_of(start)}")
            for message in messages:
                display.message(message)
            with build(config, display, world, stop=stop.is_requested) as parts:
                for line in chain(remarks_of(parts.policy.model), parts.data.lines()):
                    display.message(line)
                finished = Trainer(parts).run()
            # gloo aborts a rank whose peer exits while messages are in flight. export_model has a barrier of its own.
            world.barrier()
            weights = _export(parts, display) if finished else None
            if not finished:
                text = f"stopped after step {parts.state.step}, which is committed; the same command resumes"
                display.message(text)
        if world.is_main and weights is not None:
            _finish(parts, weights)


def rehearse(config: Config, fresh: bool = False) -> None:
    """Print the plan and check everything that `launch` needs before it loads the model; write nothing.

    A run folder that cannot be used is reported at once, and the other checks still run.
    Raises RunError, DataError, ModelError, ModelSourceError, ScorerError.
    """
    from or1.run.directory import check_run_dir, checkpoints_of, listed, require_movable

    require_place(config.run_path)
    changed: list[str] = []
    refused = ""
    try:
        if fresh:
            require_movable(config.run_path)
        else:
            changed = check_run_dir(config)
    except RunError as error:
        refused = str(error)
        tell(f"or1: {refused}")
    quiet_libraries()
    from or1.data import prompt_lines
    from or1.environment.open import problems_of_run
    from or1.model.load import load_tokenizer
    from or1.model.source import require_source
    from or1.run.checkpoint import committed_steps

    tokenizer = load_tokenizer(config.model.path)
    if config.needs_reference and config.loss.reference is not None:
        require_source(config.loss.reference)
    remarks = _rehearse_models(config)
    data = problems_of_run(config, tokenizer)
    print_plan(config, data.lines() + prompt_lines(data.prompts, tokenizer))
    for line in missing_here(config):
        print(visible(line))
    if not (fresh or refused) and (steps := committed_steps(checkpoints_of(config.run_path))):
        would = f"would resume after step {steps[-1]}"
        print(visible(listed(f"{would}, with changed settings:", changed) if changed else would))
    for line in chain(remarks, _try_rewards(config, data)):
        print(visible(line))
    if refused:
        raise RunError("the dry run found no other mistake; correct the one in the first message")


def _rehearse_models(config: Config) -> list[str]:
    """Check that the policy and the reference model can be trained, and return remarks about them."""
    from or1.model.isolation import rehearse_model

    paths = [config.model.path]
    if config.needs_reference and config.loss.reference:
        paths.append(config.loss.reference)
    each = [rehearse_model(config.model.model_copy(update={"path": path})) for path in paths]
    return list(dict.fromkeys(chain(*each)))


def _try_rewards(config: Config, data: Problems) -> list[str]:
    """Start the reward workers once before the model is loaded, so that a broken setup fails in seconds.

    A user-defined reward function is loaded but not called: a call may cost money, or depend on earlier calls.
    Return remarks about the function. Raises ScorerError, RewardFunctionError.
    """
    from or1.reward import make_scorer
    from or1.reward.capacity import check_workers

    check_workers(config.reward.workers)
    if not config.reward.functions:
        return []
    prompts = chain(data.prompts, *data.eval_prompts.values())
    with make_scorer(config.reward.model_copy(update={"workers": 1}), prompts) as scorer:
        return list(getattr(scorer, "remarks", ()))


def _prepare(config: Config, fresh: bool, lock: RunLock) -> list[str]:
    """Make the run's folder, lock it and print the plan; return messages about the folder."""
    from or1.run.directory import prepare_run_dir

    # The first lock keeps --fresh from moving a running run aside, the second is of the folder that exists afterwards.
    lock.take(make=False)
    messages = prepare_run_dir(config, fresh)
    lock.take(make=True)
    print_plan(config, [])
    return messages + lock.warnings


def _prepare_together(world: World, config: Config, fresh: bool, lock: RunLock) -> list[str]:
    """Prepare the folder on the main rank. Raise RunError on all ranks if the main rank cannot use it. Collective."""
    messages: list[str] = []
    problem = ""
    if world.is_main:
        try:
            messages = _prepare(config, fresh, lock)
        except RunError as error:
            problem = str(error)
    if found := world.gather(problem.encode())[0].decode():
        raise RunError(found)
    return messages


def _export(parts: Parts, display: RankDisplay) -> Path:
    """Write the weights as a Hugging Face checkpoint and return its folder. Collective."""
    from or1.model.export import export_model

    display.phase("export")
    folder = parts.config.run_path / "weights" / f"step_{parts.state.step}"
    return export_model(parts.policy.model, parts.tokenizer, folder, parts.world)


def _finish(parts: Parts, weights: Path) -> None:
    """Write the report and print the summary."""
    from or1.report.page import write_report
    from or1.report.summary import print_summary, summarise

    report = write_report(parts.config.run_path)
    bad_rows = sum(len(r.bad) for r in parts.data.reports)
    print_summary(summarise(parts.config, parts.state, bad_rows, report=str(report), weights=str(weights)))


def _set_allocator(config: Config) -> None:
    """Let the GPU allocator's segments grow. Call before the first use of the GPU."""
    from or1.core.allocator import expand_segments
    from or1.rollout.vllm.setup import installed_vllm, is_tested

    rollout = config.rollout
    vllm = rollout.engine == "vllm" or (rollout.engine == "auto" and is_tested(installed_vllm()))
    # vLLM's sleep mode does not bear growing segments. It turns them off for its own memory, but it looks for them only
    # under the variable's old name, about which torch warns.
    if config.model.device != "cpu" and not (vllm and rollout.vllm.placement == "colocate"):
        expand_segments()


def _only_deterministic_algorithms() -> None:
    """Make equal seeds and ranks give equal bits on the same kind of GPU. Call before the first use of the GPU."""
    # cuBLAS and NCCL read these variables once: a fixed workspace, and one order of summation.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    import torch

    torch.use_deterministic_algorithms(True)
    # Else every new buffer, the head's logits and vLLM's cache included, would be filled with nan first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # missing in torch's stub
    torch.backends.cudnn.benchmark = False
