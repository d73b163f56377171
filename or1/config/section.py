"""What every section of the configuration is: closed, frozen, with its help text under each field."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

# Far beyond any run, and small enough that products of two, seconds of a clock and 64-bit numbers hold them.
MOST_TOKENS, MOST_STEPS, MOST_SECONDS, MOST_MIB = 2**24, 10**9, 10**7, 2**24
_LONGEST_PATH, _LONGEST_NAME = 4000, 255


class Section(BaseModel):
    """A closed, immutable table: an unknown key is an error, a field never changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def path_problem(value: str) -> str:
    """Return why no file can have this name, empty if one can; the first look at the disk would raise otherwise."""
    locale = "rename it, or set LANG to a UTF-8 locale such as C.UTF-8"
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError as error:
        return f"a path cannot have the character at place {error.start + 1} here; {locale}"
    # A path of another encoding, as Python keeps it, has no text that libraries could write into their files.
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
StringList = Annotated[tuple[FilePath, ...], BeforeValidator(_listed)]
