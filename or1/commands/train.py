"""From a checked config to a finished run: directory, training, export, report, summary."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from or1.commands.dry_run import missing_here, require_place
from or1.commands.stop_request import StopRequest
from or1.config import Config, ModelConfig
from or1.core.errors import RunError
from or1.core.quiet import quiet_libraries
from or1.core.terminal import tell
from or1.core.text import visible
from or1.report.live import RunDisplay, print_plan
from or1.run.directory import check_run_dir, checkpoints_of, prepare_run_dir, require_movable
from or1.run.lock import RunLock

if TYPE_CHECKING:
    from or1.data import Problems
    from or1.dist.world import World
    from or1.report.rank_display import RankDisplay
    from or1.train.build import Parts


def launch(config: Config, fresh: bool = False) -> None:
    """Train, then export the weights and write the report; in every rank that torchrun started.

    Raises RunError, DataError, ModelError, ScorerError, CheckpointError, DistError, DiskError; in all ranks, whichever
    found it.
    """
    lock = RunLock(config.run_path)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # Before torch is imported, so that a folder that cannot be used answers at once.
        messages = _prepare(config, fresh, lock)
    quiet_libraries()
    if config.deterministic:
        _only_deterministic_algorithms()
    from or1.dist.watchdog import watched
    from or1.dist.world import join
    from or1.model.load import resolve_device
    from or1.report.rank_display import RankDisplay
    from or1.run.message_log import RunLog, logged
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
            for message in messages:
                display.message(message)
            with build(config, display, world, stop=lambda: stop.requested) as parts:
                _introduce(parts, display)
                finished = Trainer(parts).run()
            # gloo aborts a rank whose peer has gone while it still talks; export_model has such a place of its own.
            world.barrier()
            weights = _export(parts, display) if finished else None
        if world.is_main and weights is not None:
            _finish(parts, weights)


def rehearse(config: Config, fresh: bool = False) -> None:
    """Show the plan, and find what would stop `launch` before it loads the model; nothing is written.

    A run that is there with other settings is told at once, and the other mistakes are still looked for.
    Raises RunError, DataError, ModelError, ModelSourceError, ScorerError.
    """
    require_place(config.run_path)
    changed, refused = [], ""
    try:
        if fresh:
            require_movable(config.run_path)
        else:
            changed = check_run_dir(config)
    except RunError as error:
        refused = str(error)
        tell(f"or1: {refused}")
    quiet_libraries()
    from or1.data import load_problems, prompt_lines
    from or1.model.isolation import rehearse_model
    from or1.model.load import load_tokenizer
    from or1.model.source import require_source
    from or1.run.checkpoint import committed_steps

    tokenizer = load_tokenizer(config.model.path)
    if config.loss.kl_coef > 0 and config.loss.reference is not None:
        require_source(config.loss.reference)
    remarks = _rehearse_models(config, rehearse_model)
    data = load_problems(config, tokenizer)
    print_plan(config, data.lines() + prompt_lines(data.prompts, tokenizer))
    for line in missing_here(config):
        print(visible(line))
    if not (fresh or refused) and (steps := committed_steps(checkpoints_of(config.run_path))):
        print(
            visible(
                f"would resume after step {steps[-1]}" + (f", with changed {', '.join(changed)}" if changed else "")
            )
        )
    for line in remarks:
        print(visible(line))
    _try_rewards(config, data, lambda line: print(visible(line)))
    if refused:
        raise RunError("the dry run found no other mistake; the run's folder is as said above")


def _rehearse_models(config: Config, rehearse_model: Callable[[ModelConfig], list[str]]) -> list[str]:
    """What the policy and the reference model would be refused for, and remarks about them."""
    paths = [config.model.path]
    if config.loss.kl_coef and config.loss.reference:
        paths.append(config.loss.reference)
    each = [rehearse_model(config.model.model_copy(update={"path": path})) for path in paths]
    return list(dict.fromkeys(chain(*each)))


def _try_rewards(config: Config, data: Problems, tell: Callable[[str], None]) -> None:
    """Find what is wrong with the workers or a function of the user's own before minutes go into a model.

    The function is loaded once and not called: a call may cost money or depend on what it was given before. Raises
    ScorerError, RewardFunctionError.
    """
    from or1.reward import make_scorer
    from or1.reward.capacity import check_workers

    check_workers(config.reward.workers)
    if config.reward.is_function:
        prompts = chain(data.prompts, *data.eval_prompts.values())
        with make_scorer(config.reward.model_copy(update={"workers": 1}), prompts) as scorer:
            for remark in scorer.remarks:
                tell(remark)


def _prepare(config: Config, fresh: bool, lock: RunLock) -> list[str]:
    """The run's folder made ready, and locked from here on; messages about it."""
    # Once before, so that `fresh` moves no run that is at work; once more, for the folder that is there after it.
    lock.take(make=False)
    messages = prepare_run_dir(config, fresh)
    lock.take(make=True)
    print_plan(config, [])
    return messages + lock.warnings


def _prepare_together(world: World, config: Config, fresh: bool, lock: RunLock) -> list[str]:
    """The main rank prepares the folder; what stops it there stops all."""
    messages, problem = [], ""
    if world.is_main:
        try:
            messages = _prepare(config, fresh, lock)
        except RunError as error:
            problem = str(error)
    if found := world.gather(problem.encode())[0].decode():
        raise RunError(found)
    return messages


def _introduce(parts: Parts, display: RankDisplay) -> None:
    """Show what is worth knowing about the model and the data."""
    from or1.model.load import remarks_of

    for line in chain(remarks_of(parts.policy.model), parts.data.lines()):
        display.message(line)


def _export(parts: Parts, display: RankDisplay) -> Path:
    """Write the weights as a Hugging Face checkpoint and return its folder. Collective."""
    from or1.model.export import export_model

    display.phase("export")
    folder = parts.config.run_path / "weights" / f"step_{parts.state.step}"
    return export_model(parts.policy.model, parts.tokenizer, folder, parts.world)


def _finish(parts: Parts, weights: Path) -> None:
    """Write the report and show the summary."""
    from or1.report.page import write_report
    from or1.report.summary import summarise
    from or1.report.summary_text import print_summary

    report = write_report(parts.config.run_path)
    bad_rows = sum(len(r.bad) for r in parts.data.reports)
    print_summary(summarise(parts.config, parts.state, bad_rows, report=str(report), weights=str(weights)))


def _only_deterministic_algorithms() -> None:
    """Before the first use of the GPU: the same seed and ranks then give the same bits on the same kind of GPU."""
    # cuBLAS and NCCL read these once: a fixed workspace, and one order of summation.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
