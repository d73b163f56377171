"""The target of `or1 eval` (a config, a run, a checkpoint or a server) as one config."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from or1.config import Config
from or1.config.load import load_config
from or1.core.errors import ConfigError, Problem
from or1.core.terminal import tell
from or1.run.places import unreadable


@dataclass(frozen=True)
class Target:
    """A config whose `[model]` or `[endpoint]` is evaluated, and the folder for the results."""

    config: Config
    out: Path


def resolve_target(target: str, recipe: str | None, overrides: Sequence[str], step: int | None) -> Target:
    """Return the config and the results folder of a target.

    target     a TOML file, a run directory, a Hugging Face checkpoint folder, or the URL of a server
    recipe     TOML file with [[eval.sets]]; required for a checkpoint folder and for a server
    overrides  `a.b=c`, applied last
    step       checkpoint of a run, exported if necessary; None: the newest

    Raises ConfigError, and the errors of `or1.run.export.export_run`.
    """
    path = Path(target)
    if problem := unreadable(target):
        raise _refusal(target, problem)
    if re.match(r"https?://", target):
        given = _set("endpoint.url", target)
        config = load_config(_needed(recipe, target), [given, *overrides], "eval")
        return Target(config, config.run_path / "eval" / _file_name(config.endpoint.model or target))
    if (path / "config.resolved.json").is_file():
        from or1.run.directory import require_own_record

        require_own_record(path)
        weights = _weights_of_run(path, step)
        given = _set("model.path", str(weights))
        config = load_config(recipe or path / "config.resolved.json", [given, *overrides], "eval")
        label = weights.name if recipe is None else f"{weights.name}-{Path(recipe).stem}"
        return Target(config, path / "eval" / label)
    if step is not None:
        raise _refusal(target, f"--step {step} is for a run directory, which this is not; leave it out")
    if (path / "config.json").is_file():
        config = load_config(_needed(recipe, target), [_set("model.path", str(path)), *overrides], "eval")
        return Target(config, config.run_path / "eval" / _file_name(path.resolve().name))
    if path.is_dir():
        raise _refusal(
            target,
            "has no config.resolved.json and no config.json, so it is no run and no checkpoint; name another folder",
        )
    config = load_config(target, overrides, "eval")
    return Target(config, config.run_path / "eval" / path.stem)


def _needed(recipe: str | None, target: str) -> str:
    if recipe is None:
        raise _refusal(
            target,
            "has no evaluation sets; add --config with a TOML file that has "
            "[[eval.sets]], such as one of examples/recipes/eval-*.toml",
        )
    return recipe


def _weights_of_run(run_dir: Path, step: int | None) -> Path:
    from or1.model.seal import export_problem
    from or1.run.checkpoint import step_folders
    from or1.run.directory import checkpoints_of
    from or1.run.export import export_run

    exported = run_dir / "weights"
    kept = step_folders(checkpoints_of(run_dir))
    steps = list(kept)
    steps += [int(found[1]) for path in exported.glob("step_*") if (found := re.fullmatch(r"step_(\d+)", path.name))]
    if not steps:
        raise _refusal(str(run_dir), "has no checkpoint yet; wait until it has one, or name a checkpoint folder")
    chosen = max(steps) if step is None else step
    folder = exported / f"step_{chosen}"
    if not folder.is_dir():
        return export_run(run_dir, chosen, None)
    problem = export_problem(folder)
    if not problem and (folder / "config.json").is_file():
        return folder
    problem = problem or f"{folder / 'config.json'} is missing"
    if chosen not in kept:
        raise _refusal(str(run_dir), f"has no checkpoint of step {chosen} any more, and {problem}; name another --step")
    tell(f"{problem}; the weights are exported anew from the checkpoint")
    return export_run(run_dir, chosen, None)


def _refusal(target: str, message: str) -> ConfigError:
    return ConfigError(target, [Problem("target", message)])


def _set(key: str, value: str) -> str:
    return f"{key}={json.dumps(value)}"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-") or "model"
