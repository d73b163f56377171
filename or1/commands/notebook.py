"""Functions for notebooks and programs: train, evaluate and plan, as the verbs of the same names do.

    from or1 import train, evaluate, plan

    print(plan("config.toml", device="H100").fits)
    run = train("config.toml", {"optim.lr": 1e-4})
    steps, rewards = run.series("reward/mean")
    accuracy = evaluate(run.folder)["sets"]["heldout"]["avg@1"]

Relative paths are those of the working directory, or of the folder of the config. A mistake is an exception of
`or1.core.errors`, whose text is what the verb prints. Several GPUs need the command: `or1 train CONFIG --nproc N`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from or1.config.load import load_config
from or1.core.errors import ConfigError, Problem, RunError
from or1.core.installed import require_kernels
from or1.core.records import number

if TYPE_CHECKING:
    from or1.plan.estimate import Plan

Overrides = Mapping[str, object] | Sequence[str]
"""Settings that replace those of a config: `{"optim.lr": 1e-4}`, or `["optim.lr=1e-4"]` as after --set."""


@dataclass(frozen=True)
class Run:
    """A run that `train` has made, or one from earlier: `Run(Path("runs/mine"))`.

    folder  the run directory, which docs/run-directory.md describes
    """

    folder: Path

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of steps in order: mappings of metric name to number, as docs/metrics.md lists them.

        Step 0 is the evaluation before training.
        """
        from or1.run.metrics_log import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of one metric, of equal length, for a plot. Leaves out steps without the metric.

        Args:
            name: a metric of docs/metrics.md.

        Returns:
            Steps, and the value of each.

        Raises:
            RunError: no step has the metric.
        """
        records = self.metrics()
        found = [(record["step"], value) for record in records if math.isfinite(value := number(record.get(name)))]
        if not found:
            known = sorted({key for record in records for key in record})
            close = difflib.get_close_matches(name, known, n=3) or known
            instead = f"name another metric, such as {', '.join(close)}" if close else "the run has recorded no step"
            raise RunError(f"no step of {self.folder} has the metric {name!r}; {instead}")
        steps, values = zip(*found, strict=True)
        return list(steps), list(values)

    @property
    def step(self) -> int:
        """The last step that is committed, 0 before the first checkpoint."""
        from or1.run.checkpoint import committed_steps
        from or1.run.directory import checkpoints_of

        return max(committed_steps(checkpoints_of(self.folder)), default=0)

    @property
    def weights(self) -> Path | None:
        """The newest exported weights, a folder that transformers loads; None if the run has not finished."""
        found = [path for path in self.folder.glob("weights/step_*") if path.name[5:].isdecimal()]
        return max(found, key=lambda path: int(path.name[5:]), default=None)

    @property
    def report(self) -> Path | None:
        """The page report.html; None if none is written yet."""
        page = self.folder / "report.html"
        return page if page.is_file() else None


def train(config: str | Path, overrides: Overrides = (), *, fresh: bool = False) -> Run:
    """Train in this process and return the run; a run that stopped or has more steps now resumes.

    SIGTERM ends training after the step; then `weights` is None. KeyboardInterrupt, as of a notebook's stop button,
    leaves at once, and the next call resumes from the newest checkpoint.

    Args:
        config: TOML file.
        overrides: settings that replace those of the file, as --set does.
        fresh: move an earlier run of the same run_dir aside and start from scratch.

    Returns:
        The run, whose folder has metrics, weights and report.

    Raises:
        ConfigError: mistakes in the config.
        Or1Error: the errors of `or1.commands.train.launch`.
    """
    _prepare()
    from or1.commands.train import launch
    from or1.run.naming import named

    checked = named(load_config(config, _as_options(overrides)), fresh, claim=True).config
    launch(checked, fresh=fresh)
    return Run(checked.run_path)


def evaluate(
    target: str | Path,
    overrides: Overrides = (),
    *,
    config: str | Path | None = None,
    step: int | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Measure avg@k and pass@k of every evaluation set, and return the contents of eval.json: "sets" by name.

    Args:
        target: TOML file, run directory, Hugging Face folder, or URL of a server.
        overrides: settings that replace those of the config.
        config: TOML file with [[eval.sets]], for a target without its own.
        step: checkpoint of a run; None: the newest.
        out: folder for the results; None: one beside the run, which the verb prints.
        fresh: move earlier results aside; otherwise finished parts are used again.

    Returns:
        The contents of eval.json. Accuracies are shares from 0 to 1.

    Raises:
        ConfigError: mistakes in the config.
        Or1Error: the errors of `or1.commands.eval.run_evaluation`.
    """
    _prepare()
    from or1.commands.eval import run_evaluation
    from or1.eval.target import Target, resolve_target

    recipe = None if config is None else str(config)
    found = resolve_target(str(target), recipe, _as_options(overrides), step)
    return run_evaluation(Target(found.config, found.out if out is None else Path(out)), fresh)


def plan(
    config: str | Path,
    overrides: Overrides = (),
    *,
    device: str | None = None,
    gpus: int = 1,
    mean_response: int | None = None,
) -> Plan:
    """Predict memory in bytes and time in seconds of a config, without loading a weight.

    Args:
        config: TOML file; the data files that it names need not exist.
        overrides: settings that replace those of the file.
        device: name such as "H200"; None: what this machine has.
        gpus: devices that share the model.
        mean_response: tokens of a mean response, for times; None: half of each stage's limit.

    Returns:
        The plan: `fits`, `stages`, `largest_tokens`, `remedy`.

    Raises:
        ConfigError: mistakes in the config.
        PlanError: an unknown device or model.
    """
    from or1.plan.devices import find_device
    from or1.plan.estimate import make_plan
    from or1.plan.rates import measured
    from or1.plan.shapes import shape_of

    checked = load_config(config, _as_options(overrides), files=False)
    shape = shape_of(checked.model.path)
    found, _ = find_device(device, checked.model.device)
    return make_plan(checked, shape, measured(found, shape, checked.model.dtype), gpus, mean_response)


def _prepare() -> None:
    require_kernels()
    # Read once, when torch is loaded; or1/cli.py says why.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _as_options(overrides: Overrides) -> list[str]:
    """Return overrides as texts of the form `a.b=c`. Raises ConfigError for a value that TOML does not have."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={_as_toml(key, value)}" for key, value in overrides.items()]


def _as_toml(key: str, value: object) -> str:
    # Texts, numbers, booleans and lists are written alike in JSON and TOML.
    return json.dumps(_plain(key, value), ensure_ascii=False)


def _plain(key: str, value: object) -> object:
    """Return a value without paths and without the number types of numpy. Raises ConfigError as `_as_options`."""
    if isinstance(value, list | tuple):
        return [_plain(key, each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Integral | Real):
        return int(value) if isinstance(value, Integral) else float(value)
    remedy = "a setting is text, a number, True, False or a list of these; leave a key out for its default"
    raise ConfigError("overrides", [Problem(key, f"is a {type(value).__name__}; {remedy}")])
