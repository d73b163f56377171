"""`Section`, the base class of all configuration sections, and the types of paths."""

from __future__ import annotations

import os
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError

# Far beyond any run, yet small enough that a product of two fits into 64 bits and a clock accepts the seconds.
MOST_TOKENS, MOST_STEPS, MOST_SECONDS, MOST_MIB = 2**24, 10**9, 10**7, 2**24
_LONGEST_PATH, _LONGEST_NAME = 4000, 255


class Section(BaseModel):
    """Closed, immutable table: an unknown key is an error, and no field changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the section class in a field's type, None for a plain value, and True for a list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    inner = [each for each in get_args(annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
    # An optional section, such as [model.lora], is no list.
    return (inner[0], get_origin(annotation) is tuple) if inner else (None, False)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def path_problem(value: str) -> str:
    """Return the reason why no file can have this name, "" if one can. Access to such a path would raise an error."""
    locale = "rename it, or set LANG to a UTF-8 locale such as C.UTF-8"
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError as error:
        return f"a path cannot have the character at place {error.start + 1} here; {locale}"
    # Python represents undecodable bytes by surrogates, which libraries cannot write into their files.
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        return f"a path must be text in this locale; {locale}"
    if not value.strip() or "\0" in value:
        return "a path must not be empty or hold a NUL character; name a file or folder"
    longest = max(map(len, encoded.split(b"/")))
    if longest > _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
        return (
            f"a path has at most {_LONGEST_PATH} bytes, and {_LONGEST_NAME} between two slashes; this has "
            f"{len(encoded)} and {longest}; shorten it"
        )
    return ""


def _usable_path(value: str) -> str:
    if problem := path_problem(value):
        raise PydanticCustomError("path", "{problem}", {"problem": problem})
    return value


FilePath = Annotated[str, AfterValidator(_usable_path)]
_Url = Annotated[str, StringConstraints(pattern=r"^https?://[^/\s]+$")]
FilePaths = FilePath | tuple[FilePath, ...]
# The input types are for the JSON schema, which knows nothing of what a validator does.
UrlList = Annotated[tuple[_Url, ...], BeforeValidator(_listed, json_schema_input_type=_Url | tuple[_Url, ...])]
StringList = Annotated[tuple[FilePath, ...], BeforeValidator(_listed, json_schema_input_type=FilePaths)]


def each_of(paths: FilePaths) -> tuple[str, ...]:
    """Return the paths of a setting that is one path or a list of paths."""
    return (paths,) if isinstance(paths, str) else paths
