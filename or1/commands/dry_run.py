"""Checks of `or1 train --dry-run`: can the run's folder be made, and what does this machine lack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from or1.config import Config
from or1.core.errors import RunError
from or1.core.terminal import tell


def require_place(run_dir: Path) -> None:
    """Raise RunError unless a run can write in this folder, or create it."""
    remedy = "choose another folder with --set run_dir=..."
    try:
        place = run_dir.absolute()
        while not place.exists() and not place.is_symlink():
            place = place.parent
        if not place.is_dir():
            raise RunError(f"run_dir = {str(run_dir)!r} cannot be made: {place} is not a folder; {remedy}")
        if not os.access(place, os.W_OK | os.X_OK):
            raise RunError(
                f"run_dir = {str(run_dir)!r} cannot be written: this user may not write in {place}; {remedy}"
            )
    except OSError as error:
        raise RunError(f"run_dir = {str(run_dir)!r} cannot be looked at ({error}); {remedy}") from error


def warn_of_limits(config: Config, nproc: int | None, job_hours: float | None, grace_s: float | None) -> None:
    """Print on standard error what the limits of a job would cost; nothing if no limit is known."""
    from or1.plan.job import JobLimits, gpus_of_job, job_warnings, steps_of

    limits = JobLimits.found(job_hours, grace_s)
    if limits.job_s is None and grace_s is None:
        return
    for warning in job_warnings(config, steps_of(config, nproc or gpus_of_job()), limits):
        tell(warning)


def missing_here(config: Config) -> Iterator[str]:
    """Yield a line for each thing that the config needs and this machine lacks. Another machine may have it."""
    import torch

    from or1.core.errors import AttentionError, EngineError, ModelError, OptimizerError
    from or1.model.attention import choose_backend
    from or1.model.load import resolve_device
    from or1.rollout.make import engine_warnings
    from or1.rollout.vllm.setup import require_vllm
    from or1.train.adam import make_rule

    try:
        device = resolve_device(config.model.device)
    except ModelError as error:
        yield f"not here: {error}"
        device = torch.device(config.model.device)
    try:
        choose_backend(config.model.attention, device, getattr(torch, config.model.dtype))
    except AttentionError as error:
        yield f"not here: {error}"
    if config.model.liger == "on" and device.type != "cuda":
        yield f'not here: model.liger = "on" needs a GPU, and the model is on the {device.type}; use "auto"'
    try:
        make_rule(config.optim)
    except OptimizerError as error:
        yield f"not here: {error}"
    if config.rollout.engine == "vllm":
        try:
            require_vllm(config.rollout.vllm.allow_untested)
        except EngineError as error:
            yield f"not here: {error}"
    yield from engine_warnings(config, device)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks % config.dist.sequence_parallel:
        yield (
            f"not here: dist.sequence_parallel = {config.dist.sequence_parallel} needs a multiple of as many ranks, "
            f"and this start has {ranks}; add --nproc, or lower it"
        )
    if ranks > 1 and ranks % (config.dist.shard_ranks or 1):
        yield f"not here: dist.shard_ranks = {config.dist.shard_ranks} does not divide the {ranks} ranks of this start"
