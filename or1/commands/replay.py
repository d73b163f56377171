"""`or1 replay RUN STEP`: repeat one step from the checkpoint before it and its saved rollouts, for debugging.

Nothing is generated and nothing is written. On the machine that ran the step, the metrics are bit-identical.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from or1.commands.arguments import positive
from or1.core.errors import RunError
from or1.core.quiet import quiet_libraries
from or1.report.console import default_console

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rich.console import Console
    from rich.table import Table

    from or1.core.types import Prompt, Response, Score
    from or1.train.build import Parts

COMPARED = (
    "reward/mean",
    "group/kept",
    "policy/entropy",
    "policy/entropy_coef",
    "policy/entropy_exact",
    "policy/clip_frac",
    "policy/ratio_mean",
    "mismatch/kl",
    "optim/loss",
    "optim/grad_norm",
    "optim/lr",
    "optim/updates",
    "optim/skipped",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 replay`."""
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument("step", type=positive, help="step to repeat; its rollouts and the checkpoint before must exist")


def run(arguments: argparse.Namespace) -> int:
    """Repeat the step and print the comparison. Raises RunError."""
    replay(arguments.run_dir, arguments.step)
    return 0


def replay(run_dir: Path, step: int, console: Console | None = None) -> dict[str, float]:
    """Repeat `step`, print its metrics and those that the run recorded, and return its metrics.

    The replay starts from the newest checkpoint before the step, or from the untrained model, and repeats all steps
    in between. Raises RunError if the folder is no run, or the rollouts of a step are not saved.
    """
    from or1.dist.watchdog import Watchdog
    from or1.dist.world import SINGLE
    from or1.report.live import RunDisplay
    from or1.report.rank_display import RankDisplay
    from or1.run.checkpoint import committed_steps
    from or1.run.directory import checkpoints_of, recorded_run
    from or1.run.metrics_log import read_metrics
    from or1.train.build import build

    config = recorded_run(run_dir).model_copy(update={"run_dir": str(run_dir)})
    # Nothing is generated, so vLLM does not have to start.
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": "hf"})})
    if step > config.total_steps:
        raise RunError(f"step {step} is past the last of {config.total_steps} steps")
    base = max((s for s in committed_steps(checkpoints_of(run_dir)) if s < step), default=0)
    paths = {n: run_dir / "rollouts" / f"step_{n}.parquet" for n in range(base + 1, step + 1)}
    if missing := [n for n, path in paths.items() if not path.is_file()]:
        raise RunError(
            f"the rollouts of steps {missing} are not saved, and the newest checkpoint before step {step} is "
            f"{base or 'the untrained model'}; put the files back, or set log.rollouts_every_steps = 1"
        )
    quiet_libraries()
    console = console or default_console()
    with RunDisplay(step - base, config.stage, console) as shown:
        display = RankDisplay(Watchdog(SINGLE, config.dist.heartbeat_timeout_s), shown)
        metrics: dict[str, float] = {}
        with build(config, display, resume=base, scorer=_NoScorer()) as parts:
            for number, path in paths.items():
                metrics = _repeat(parts, number, path)
    recorded = next((line for line in read_metrics(run_dir / "metrics.jsonl") if line["step"] == step), {})
    console.print(_comparison(step, recorded, metrics))
    return metrics


class _NoScorer:
    """A scorer for a run that grades nothing: the rewards are those of the saved rollouts."""

    remarks = ()

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        raise RunError("a replay grades no response")

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> _NoScorer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _repeat(parts: Parts, number: int, path: Path) -> dict[str, float]:
    """Train step `number` on the rollouts saved in `path`, and return its metrics."""
    import torch

    from or1.rollout.collect import Rollout
    from or1.run.rollout_log import read_rollouts
    from or1.trainer import Trainer

    step = parts.state.stages.step(number)
    parts.rollouts.skip(step)
    torch.manual_seed(step.seed)
    by_id = {prompt.id: prompt for prompt in parts.data.prompts}
    try:
        groups = read_rollouts(path, number, by_id, step.stage.group_size)
    except KeyError as error:
        raise RunError(f"{path} has prompt {error}, which data.train no longer has; restore those files") from error
    if any(len(group.responses) != step.stage.group_size for group in groups):
        raise RunError(f"{path} has groups of other than {step.stage.group_size} responses; restore that file")
    metrics = Trainer(parts).learn(step, Rollout(groups, 0.0, 0.0), replayed=True)
    parts.state.step = number
    parts.state.stages.advance(number)
    return metrics


def _comparison(step: int, recorded: dict[str, float], found: dict[str, float]) -> Table:
    from rich.table import Table

    table = Table(f"step {step}", "recorded", "replayed", "", box=None, pad_edge=False)
    for key in COMPARED:
        if key in found:
            was, now = recorded.get(key), found[key]
            verdict = "not recorded" if was is None else "same bits" if was == now else f"differs by {now - was:.3g}"
            table.add_row(key, "-" if was is None else repr(was), repr(now), verdict)
    return table
