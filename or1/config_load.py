"""TOML files and `--set` overrides -> Config, or every mistake at once with its path and remedy."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from or1.config import Config


class Problem(NamedTuple):
    """One mistake: where (dotted path), and what is wrong with a remedy."""

    path: str
    message: str


class ConfigError(ValueError):
    """A config that cannot run; `problems` holds every mistake found."""

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.source, self.problems = source, tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{source}: {count}"]
        lines += [f"  {i}. {p.path}: {p.message}" for i, p in enumerate(problems, 1)]
        super().__init__("\n".join(lines))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `a.b=c` overrides, validate.

    Raises ConfigError with all mistakes: unreadable file, TOML syntax, unknown keys, types, ranges, missing files and
    contradictions between sections.
    """
    data = _read_toml(Path(path))
    problems = [p for text in overrides if (p := _apply_override(data, text)) is not None]
    config, found = _validate(data)
    problems += found
    if config is not None:
        problems += _contradictions(config)
    if problems or config is None:
        raise ConfigError(str(path), problems)
    return config


def dump_config(config: Config) -> str:
    """The resolved config as JSON, which keeps nulls where TOML cannot."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [Problem("file", f"cannot be read ({error.strerror}); check the path")]) from error
    except UnicodeDecodeError as error:
        problem = Problem("file", f"is not UTF-8 at byte {error.start}; save it as UTF-8")
        raise ConfigError(str(path), [problem]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), [Problem("file", f"is not TOML: {error}")]) from error


def _apply_override(data: dict[str, Any], text: str) -> Problem | None:
    """Write one `a.b=c` into `data`; c is read as TOML, or as a plain string where it is not. Lists take an index."""
    key, sep, raw = text.partition("=")
    if not sep or not key.strip():
        return Problem(f"--set {text}", "is not of the form section.key=value; write for example --set optim.lr=1e-6")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    *parents, last = key.strip().split(".")
    node: Any = data
    for part in parents:
        node = _child(node, part)
        if node is None:
            return Problem(f"--set {text}", f"{part!r} in {key.strip()!r} is not a table of the config")
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return Problem(f"--set {text}", f"{last!r} is not an index into a list of {len(node)}; count from 0")
        node[int(last)] = value
    else:
        node[last] = value
    return None


def _child(node: Any, part: str) -> Any:
    if isinstance(node, list):
        child = node[int(part)] if part.isdigit() and int(part) < len(node) else None
    else:
        child = node.setdefault(part, {})
    return child if isinstance(child, dict | list) else None


def _validate(data: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """Validate; on errors also the config without the offending keys, so that contradictions still show."""
    try:
        return Config.model_validate(data), []
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors()]
        _remove_offenders(data, [e["loc"] for e in error.errors()])
        try:
            return Config.model_validate(data), problems
        except ValidationError:
            return None, problems


def _remove_offenders(data: dict[str, Any], locations: list[tuple[int | str, ...]]) -> None:
    for *parents, last in locations:
        node: Any = data
        for part in parents:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                node = None
        if isinstance(node, dict):
            node.pop(last, None)


def _explain(error: Any) -> Problem:
    location = error["loc"]
    section, field_help = _describe(location)
    path = ".".join(str(part) for part in location)
    match error["type"]:
        case "extra_forbidden":
            close = difflib.get_close_matches(str(location[-1]), section, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it."
            return Problem(path, f"unknown key; {hint} Known keys: {', '.join(section)}")
        case "missing":
            return Problem(path, f"missing; add it. {field_help}")
        case _:
            return Problem(path, f"{error['input']!r} is refused: {error['msg']}. {field_help}")


def _describe(location: tuple[int | str, ...]) -> tuple[list[str], str]:
    """The keys of the section that holds `location`, and the help text of the field there (with its default)."""
    model: type[BaseModel] = Config
    names: list[str] = list(Config.model_fields)
    text = ""
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(part, str) else None
        if field is None:
            continue
        default = "" if field.is_required() or field.default is None else f" Default: {field.default!r}."
        text = f"{field.description or ''}{default if not isinstance(field.default, BaseModel) else ''}".strip()
        if (child := _section_type(field.annotation)) is not None:
            model, names = child, list(child.model_fields)
    return names, text


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
    return inner[0] if inner else None


def _contradictions(config: Config) -> list[Problem]:
    return [problem for rule in _RULES for problem in rule(config)]


def _files_exist(config: Config) -> Iterator[Problem]:
    named = [(f"data.train.{i}", path) for i, path in enumerate(config.data.train)]
    named += [(f"eval.sets.{i}.path", s.path) for i, s in enumerate(config.eval.sets)]
    for where, path in named:
        if not Path(path).is_file():
            yield Problem(where, f"no file {path!r} (looked in {Path.cwd()}); correct the path")
    model = Path(config.model.path)
    looks_local = config.model.path.startswith((".", "/", "~")) or config.model.path.count("/") != 1
    if looks_local and not (model / "config.json").is_file():
        yield Problem("model.path", f"no config.json in {config.model.path!r} (looked in {Path.cwd()}); "
                      "name a Hugging Face checkpoint folder or a hub id such as Qwen/Qwen2.5-1.5B")


def _stages_fit(config: Config) -> Iterator[Problem]:
    for i, stage in enumerate(config.stage):
        minibatch = stage.minibatch_prompts
        if minibatch is not None and minibatch > stage.prompts_per_step:
            yield Problem(f"stage.{i}.minibatch_prompts", f"{minibatch} is more than prompts_per_step = "
                          f"{stage.prompts_per_step}; lower it, or leave it out for on-policy training")
        longest = config.data.max_prompt_tokens + stage.max_response_tokens
        if longest > config.optim.max_tokens_per_rank:
            yield Problem("optim.max_tokens_per_rank", f"{config.optim.max_tokens_per_rank} is less than the longest "
                          f"sequence of stage {i} ({config.data.max_prompt_tokens} prompt + "
                          f"{stage.max_response_tokens} response tokens); raise it to at least {longest}")


def _entropy_bounds(config: Config) -> Iterator[Problem]:
    entropy = config.loss.entropy
    if entropy.coef_min > entropy.coef_max:
        yield Problem("loss.entropy.coef_min", f"{entropy.coef_min} is above coef_max = {entropy.coef_max}; swap them")
    if entropy.control == "adaptive" and not entropy.coef_min <= entropy.coef <= entropy.coef_max:
        yield Problem("loss.entropy.coef", f"{entropy.coef} is outside [{entropy.coef_min}, {entropy.coef_max}], "
                      "the bounds of the adaptive controller; start inside them")
    if entropy.control == "none" and entropy.coef > 0:
        yield Problem("loss.entropy.coef", f'{entropy.coef} has no effect under control = "none"; '
                      'set control = "constant" or remove coef')


def _betas_valid(config: Config) -> Iterator[Problem]:
    for i, beta in enumerate(config.optim.betas):
        if not 0 <= beta < 1:
            yield Problem(f"optim.betas.{i}", f"{beta} is outside [0, 1); AdamW's usual values are 0.9 and 0.999")


def _eval_names_unique(config: Config) -> Iterator[Problem]:
    names = [s.name for s in config.eval.sets]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield Problem("eval.sets", f"{names.count(name)} sets are named {name!r}; give each its own name")


_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _files_exist,
    _stages_fit,
    _entropy_bounds,
    _betas_valid,
    _eval_names_unique,
)
