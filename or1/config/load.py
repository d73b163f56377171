"""Loading: a TOML file and `--set` overrides become a Config, or an error with every mistake, its path and a remedy."""

from __future__ import annotations

import difflib
import json
import reprlib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from or1.config import Config
from or1.config.paths import found_from
from or1.config.peers import known_as, nearest
from or1.config.rules import Verb, contradictions
from or1.config.section import section_of
from or1.core.errors import ConfigError, Problem

# Replaces a refused number that is required; valid for every such field.
_PLACEHOLDER = 2
_DEEPEST = 8
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200


def load_config(path: str | Path, overrides: Sequence[str] = (), verb: Verb = "train", *, files: bool = True) -> Config:
    """Read a TOML file or a run's config.resolved.json, apply `a.b=c` overrides, and validate for `verb`.

    files  False: the files that the config names need not exist

    A file that does not exist relative to the working directory is searched relative to the config's folder, then
    relative to its parent.

    Raises ConfigError with all mistakes: unreadable file, TOML syntax, unknown keys, types, ranges, missing files and
    contradictions between sections.
    """
    data = _read_file(Path(path))
    problems = [p for text in overrides if (p := _apply_override(data, text)) is not None]
    config, found = _validate(data)
    problems += found
    if config is not None:
        config = found_from(Path(path), config).named_after(Path(path))
    if config is not None:
        problems += [p for p in contradictions(config, verb, files) if not _follows_from(p, found)]
    if problems or config is None:
        raise ConfigError(str(path), problems)
    return config


def dump_config(config: Config) -> str:
    """Return the resolved config as JSON, which has nulls, unlike TOML."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(str(path), [Problem("file", f"cannot be read ({error.strerror}); check the path")]) from error
    except UnicodeDecodeError as error:
        problem = Problem("file", f"is not UTF-8 at byte {error.start}; save it as UTF-8")
        raise ConfigError(str(path), [problem]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), [Problem("file", f"is not TOML: {error}")]) from error
    except json.JSONDecodeError as error:
        raise ConfigError(str(path), [Problem("file", f"is not JSON: {error}")]) from error
    except RecursionError as error:
        problem = Problem("file", "nests too deeply to be read; no setting needs more than three levels")
        raise ConfigError(str(path), [problem]) from error
    except ValueError as error:
        # For example a number with more digits than int() accepts.
        raise ConfigError(str(path), [Problem("file", f"cannot be read ({error}); correct that value")]) from error
    if not isinstance(data, dict):
        problem = Problem("file", f"holds a {type(data).__name__} where a table of settings is expected")
        raise ConfigError(str(path), [problem])
    return data


def _apply_override(data: dict[str, Any], text: str) -> Problem | None:
    """Write one `a.b=c` into `data`. c is parsed as TOML, else taken as a plain string. Lists take an index."""
    key, sep, raw = text.partition("=")
    if not sep or not key.strip():
        return Problem(
            f"--set {_shorter(text)}",
            "is not of the form section.key=value; write it as one word, for example --set optim.lr=1e-6",
        )
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    except (ValueError, RecursionError) as error:
        return Problem(
            f"--set {_shorter(key.strip())}", f"has a value that cannot be read ({type(error).__name__}: {error})"
        )
    *parents, last = key.strip().split(".")
    if len(parents) > _DEEPEST:
        return Problem(
            f"--set {_shorter(key.strip())}",
            f"names {len(parents) + 1} levels; no setting has more than four, as eval.sets.0.path",
        )
    node: Any = data
    for part in parents:
        node = _child(node, part)
        if node is None:
            return Problem(
                f"--set {_shorter(text)}", f"{_shown(part)} in {_shown(key.strip())} is not a table of the config"
            )
    if isinstance(node, list):
        place = _index(last, node)
        if place is None:
            return Problem(
                f"--set {_shorter(text)}", f"{_shown(last)} is not an index into a list of {len(node)}; count from 0"
            )
        node[place] = value
    else:
        node[last] = value
    return None


def _child(node: Any, part: str) -> Any:
    if isinstance(node, list):
        place = _index(part, node)
        child = node[place] if place is not None else None
    else:
        child = node.setdefault(part, {})
    return child if isinstance(child, dict | list) else None


def _index(text: str, items: list[Any]) -> int | None:
    # Digits of other scripts are refused, since int() may not accept them.
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < len(items):
        return int(text)
    return None


def _shown(value: object) -> str:
    """Return a value for a message, shortened. Numbers with thousands of digits and deep lists have no repr."""
    try:
        return _SHOWN.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too large to show"


def _shorter(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:190]}..."


def _validate(data: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """Return the validated config and its problems.

    On errors the offending values are removed or replaced, and the rest is validated again. The caller can then still
    check the rest for contradictions. Returns None as config if the second validation fails too.
    """
    try:
        return Config.model_validate(data), []
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors()]
        for each in error.errors():
            _mend(data, each["loc"], each["type"])
        try:
            return Config.model_validate(data), problems
        except ValidationError:
            return None, problems


def _mend(data: dict[str, Any], location: tuple[int | str, ...], kind: str) -> None:
    """Remove the offending value, or replace a required one by a valid placeholder."""
    *parents, last = location
    node: Any = data
    for part in parents:
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    if isinstance(node, dict):
        node.pop(last, None)
        field = _field(location) if kind != "extra_forbidden" else None
        if field is not None and field.is_required():
            node[str(last)] = _placeholder(field)


def _placeholder(field: FieldInfo) -> Any:
    if (section := section_of(field.annotation)[0]) is not None:
        return {name: _placeholder(each) for name, each in section.model_fields.items() if each.is_required()}
    return "-" if field.annotation is str else _PLACEHOLDER


def _follows_from(problem: Problem, refused: Sequence[Problem]) -> bool:
    """Return True if a contradiction concerns a refused value or its placeholder."""
    return any(
        f"{problem.path}.".startswith(f"{each.path}.")
        or f"{each.path.rpartition('.')[2]} = {_PLACEHOLDER}" in problem.message
        for each in refused
    )


def _explain(error: Any) -> Problem:
    location = error["loc"]
    section, field_help = _describe(location)
    path = ".".join(str(part) for part in location)
    match error["type"]:
        case "extra_forbidden":
            return Problem(
                path, f"unknown key; {_hint(location, section, error['input'])} Known keys: {', '.join(section)}"
            )
        case "missing":
            return Problem(path, f"missing; add it. {field_help}")
        case "string_pattern_mismatch":
            return Problem(
                path, f"{_shown(error['input'])} is refused: it is not of the form of this setting. {field_help}"
            )
        case "literal_error":
            close = difflib.get_close_matches(str(error["input"])[:100], error["ctx"]["expected"].split("'")[1::2], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            return Problem(path, f"{_shown(error['input'])} is refused: {error['msg']}.{hint} {field_help}")
        case _:
            return Problem(path, f"{_shown(error['input'])} is refused: {error['msg']}. {field_help}")


def _hint(location: tuple[int | str, ...], section: list[str], given: object) -> str:
    """Return advice for an unknown key: or1's name for another trainer's key, the right section, or the spelling."""
    name = str(location[-1])
    close = difflib.get_close_matches(name, section, n=1)
    elsewhere = known_as(Config, name, given) or ([] if close else nearest(Config, name))
    if elsewhere:
        return f"here it is {' or '.join(elsewhere)}."
    return f"did you mean {close[0]!r}?" if close else "remove it."


def _describe(location: tuple[int | str, ...]) -> tuple[list[str], str]:
    """Return the keys of the section that contains `location`, and the field's help text with its default."""
    names: list[str] = list(Config.model_fields)
    text = ""
    for field in _fields(location):
        default = "" if field.is_required() or field.default is None else f" Default: {field.default!r}."
        about = " ".join((field.description or "").split())
        text = f"{about}{default if not isinstance(field.default, BaseModel) else ''}".strip()
        if (child := section_of(field.annotation)[0]) is not None:
            names = list(child.model_fields)
    return names, text


def _fields(location: tuple[int | str, ...]) -> Iterator[FieldInfo]:
    """Yield the fields on the path `location`, without list indices and unknown keys."""
    model: type[BaseModel] = Config
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(part, str) else None
        if field is not None:
            yield field
            model = section_of(field.annotation)[0] or model


def _field(location: tuple[int | str, ...]) -> FieldInfo | None:
    return next(reversed(list(_fields(location))), None) if isinstance(location[-1], str) else None
