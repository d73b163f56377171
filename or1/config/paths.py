"""Resolution of the paths in a config: relative to the working directory, or to the folder of the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from or1.config import Config
from or1.config.data_paths import expanded
from or1.config.section import FilePaths


def is_file(path: str | Path) -> bool:
    """Return True if the path is a visible file; False if a parent folder may not be searched."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: str | Path) -> bool:
    """Return True if the path is a visible folder."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def found_from(source: Path, config: Config) -> Config:
    """Return the config with paths that exist only relative to the config's folder, or its parent, resolved from there.

    source  the config's file

    A path that exists relative to the working directory stays unchanged, and so does one that exists nowhere. Folders
    and patterns of data become the names of their files, so the resolved config names every file.
    """
    try:
        folder = source.absolute().parent
    except OSError:
        return config
    places = [folder, folder.parent]

    def data(path: str) -> str:
        return _found(path, places, is_file)

    def problems(paths: FilePaths) -> FilePaths:
        return expanded(paths, places)

    def model(path: str) -> str:
        return _found(path, places, is_dir)

    given, reward, loss = config.data, config.reward, config.loss

    def function(kind: str) -> str:
        script, colon, name = kind.rpartition(":")
        return f"{data(script)}{colon}{name}" if script.endswith(".py") else kind

    parts = tuple(part.model_copy(update={"kind": function(part.kind)}) for part in reward.parts)
    sets = tuple(each.model_copy(update={"path": problems(each.path)}) for each in config.eval.sets)
    mix = tuple(part.model_copy(update={"path": problems(part.path)}) for part in given.mix)
    drafts = config.rollout.vllm.speculative
    drafts = drafts.model_copy(update={"model": drafts.model and model(drafts.model)})
    vllm = config.rollout.vllm.model_copy(update={"speculative": drafts})
    files = {
        "train": problems(given.train),
        "mix": mix,
        "decontaminate_against": problems(given.decontaminate_against),
        "difficulty_file": given.difficulty_file and data(given.difficulty_file),
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": model(config.model.path)}),
            "loss": loss.model_copy(update={"reference": loss.reference and model(loss.reference)}),
            "reward": reward.model_copy(update={"kind": function(reward.kind), "parts": parts}),
            "rollout": config.rollout.model_copy(update={"vllm": vllm}),
            "eval": config.eval.model_copy(update={"sets": sets}),
            "data": given.model_copy(update=files),
            "environment": config.environment.model_copy(update={"id": data(config.environment.id)}),
        }
    )


def _found(path: str, places: list[Path], there: Callable[[str | Path], bool]) -> str:
    if Path(path).is_absolute() or there(path):
        return path
    return next((str(place / path) for place in places if there(place / path)), path)
