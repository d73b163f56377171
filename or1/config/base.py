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


def _usable_path(value: str) -> str:
    """Refuse what no file can be named, which would otherwise end in a traceback at the first look at the disk."""
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError as error:
        raise PydanticCustomError("path", "a path cannot have the character at place {place} here; rename it, or set "
                                  "LANG to a UTF-8 locale such as C.UTF-8", {"place": error.start + 1}) from error
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise PydanticCustomError("path", "a path must be text in this locale; rename it, or set LANG to a UTF-8 "
                                  "locale such as C.UTF-8")
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("path", "a path must not be empty or hold a NUL character")
    longest = max(map(len, encoded.split(b"/")))
    if longest > _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
        raise PydanticCustomError("path", "a path has at most {total} bytes, and {part} between two slashes; this has "
                                  "{has} and {long}", {"total": _LONGEST_PATH, "part": _LONGEST_NAME,
                                                       "has": len(encoded), "long": longest})  # fmt: skip
    return value


FilePath = Annotated[str, AfterValidator(_usable_path)]
StringList = Annotated[tuple[FilePath, ...], BeforeValidator(_listed)]
