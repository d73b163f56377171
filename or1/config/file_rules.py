"""Rules about the files that a config names: they exist, and are safe to open."""

from __future__ import annotations

import glob
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from or1.config import Config
from or1.config.data_paths import ENDINGS, HUB, dataset_of
from or1.config.paths import is_dir, is_file
from or1.config.published import PUBLISHED
from or1.config.root import TIME
from or1.config.section import each_of, path_problem
from or1.core.errors import Problem


def training_files(config: Config) -> Iterator[Problem]:
    """Find missing files of `[data]`."""
    data = config.data
    named = [(f"data.train.{i}", path) for i, path in enumerate(data.train)]
    named += [(f"data.mix.{i}.path", path) for i, part in enumerate(data.mix) for path in each_of(part.path)]
    named += [(f"data.decontaminate_against.{i}", path) for i, path in enumerate(data.decontaminate_against)]
    named += [] if data.difficulty_file is None else [("data.difficulty_file", data.difficulty_file)]
    yield from missing_files(named)


def missing_files(named: Sequence[tuple[str, str]]) -> Iterator[Problem]:
    """Find missing files among (dotted path of the setting, file) pairs."""
    seen: set[str] = set()
    for where, path in named:
        # A file may be named twice, which doubles its weight. If it is missing, it is reported once.
        if path in seen:
            continue
        seen.add(path)
        if path.startswith(HUB):
            if dataset_of(path) is None:
                yield Problem(
                    where,
                    f"{path!r} is not the name of a dataset; write hf:OWNER/NAME:CONFIG/SPLIT, such as "
                    "hf:openai/gsm8k:main/train, or hf:OWNER/NAME/FILE for one file of its repository",
                )
        elif is_dir(path):
            yield Problem(where, f"{path!r} is a folder without data files ({', '.join(ENDINGS)})")
        elif not is_file(path) and glob.has_magic(path):
            yield Problem(where, f"no file matches the pattern {path!r} (looked in {Path.cwd()}); correct the pattern")
        elif not is_file(path):
            yield Problem(
                where,
                f"no file {path!r} (looked in {Path.cwd()}); correct the path, or put the file there: {_source(path)}",
            )


def _source(path: str) -> str:
    """Return the command that writes a published file of this name, else where formats and contents are described."""
    for name, published in PUBLISHED.items():
        if Path(path).name in {made.file for made in published.files}:
            return f"`or1 data {name} --out {shlex.quote(str(Path(path).parent))}` writes it"
    return "docs/own-data.md names the formats, and the first lines of a recipe the contents"


def files_exist(config: Config) -> Iterator[Problem]:
    """Find missing files of evaluation sets and models."""
    sets = enumerate(config.eval.sets)
    yield from missing_files([(f"eval.sets.{i}.path", path) for i, each in sets for path in each_of(each.path)])
    if config.endpoint.url is not None:
        return
    yield from _model_there(config, "model.path", config.model.path)
    if config.needs_reference and config.loss.reference is not None:
        yield from _model_there(config, "loss.reference", config.loss.reference)
    if config.rollout.vllm.speculative.model is not None:
        yield from _model_there(config, "rollout.vllm.speculative.model", config.rollout.vllm.speculative.model)


def _model_there(config: Config, where: str, path: str) -> Iterator[Problem]:
    model = Path(path)
    # A hub id has one slash too, but its first part is no folder here, and no data file is in a folder of that name.
    files = (*config.data.files, *(path for each in config.eval.sets for path in each_of(each.path)))
    data = {part for each in files for part in Path(each).parts[:1]}
    looks_local = (
        path.startswith((".", "/", "~"))
        or path.count("/") != 1
        or is_dir(model.parent)
        or data.intersection(model.parts[:1])
    )
    if looks_local and not is_file(model / "config.json"):
        yield Problem(
            where,
            f"no config.json in {path!r} (looked in {Path.cwd()}); "
            "name a Hugging Face checkpoint folder or a hub id such as Qwen/Qwen2.5-1.5B",
        )


def paths_usable(config: Config) -> Iterator[Problem]:
    """Check settings that are paths only for some values, which the type of their field cannot express."""
    rewards = [(f"reward.parts.{i}.kind", part.kind) for i, part in enumerate(config.reward.parts)]
    for where, path in (("loss.reference", config.loss.reference), ("reward.kind", config.reward.kind), *rewards):
        if path is not None and (problem := path_problem(path)):
            yield Problem(where, problem)
    if TIME in str(Path(config.run_dir).parent) or config.run_dir.count(TIME) > 1:
        yield Problem("run_dir", f"{TIME} may stand once, and only in the last part of the path; move it there")
    vllm = config.rollout.vllm
    if TIME in config.run_dir and vllm.url is not None and vllm.transport == "file":
        yield Problem(
            "run_dir",
            f'{config.run_dir!r} is chosen by the time, and with rollout.vllm.transport = "file" `or1 serve` reads the '
            "weights from the folder of the run; name a folder, the same for `or1 serve` and `or1 train`",
        )


def reward_file_exists(config: Config) -> Iterator[Problem]:
    """Find missing files of reward functions."""
    for i, kind in enumerate(config.reward.kinds):
        place = kind.rpartition(":")[0]
        if place.endswith(".py") and not is_file(place):
            where = f"reward.parts.{i}.kind" if config.reward.parts else "reward.kind"
            yield Problem(where, f"no file {place!r} (looked in {Path.cwd()}); correct the path")


def nothing_to_execute(config: Config) -> Iterator[Problem]:
    """Refuse a model folder with pickled weights only, or with a config that names code of its own."""
    folder = Path(config.model.path)
    if not is_file(folder / "config.json"):
        return
    unsafe = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
    if unsafe and not any(folder.glob("*.safetensors")):
        yield Problem(
            "model.path",
            f"{folder / unsafe[0]} is pickled, which or1 never reads; convert it with "
            "transformers' save_pretrained, in a place where it may run code",
        )
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if is_file(path) and '"auto_map"' in _text(path):
            yield Problem(
                "model.path",
                f"{path} asks for code that came with the checkpoint (auto_map), which or1 "
                "never runs; use a model that transformers supports, and remove auto_map",
            )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # Loading the model reports what is wrong with the file.


def positions_reach(config: Config) -> Iterator[Problem]:
    """Refuse response limits beyond max_position_embeddings of a local model folder. A hub id is not checked here."""
    path = Path(config.model.path) / "config.json"
    if not is_file(path) or config.endpoint.url is not None:
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        known = known.get("text_config", known)
        positions, rope = known["max_position_embeddings"], known.get("rope_scaling") or known.get("rope_parameters")
        # Each kind of scaling extends the positions by its own rule.
        if not isinstance(positions, int) or (rope and rope.get("rope_type", "default") != "default"):
            return
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return  # Loading the model reports what is wrong with the file.
    limits: list[tuple[str, int | None]] = [
        *((f"stage.{i}.max_response_tokens", stage.max_response_tokens) for i, stage in enumerate(config.stage)),
        ("eval.max_response_tokens", config.eval.max_response_tokens),
        ("filter.max_response_tokens", config.filter.max_response_tokens),
    ]
    for where, limit in limits:
        if limit is not None and limit > positions:
            yield Problem(
                where,
                f"{limit} is more than max_position_embeddings = {positions} in {path}, beyond which "
                "the model was not trained; lower it, or raise that if the model supports more",
            )
