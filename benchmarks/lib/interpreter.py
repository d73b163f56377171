"""Whether Triton's interpreter works with the numpy that is installed."""

from __future__ import annotations

from importlib import metadata


def why_not() -> str | None:
    """Return the reason why Triton's interpreter fails here, or None.

    Triton before 3.7 converts arrays of one element to Python numbers, which numpy refuses since 2.4. Nothing is
    imported: the interpreter's switch must be set before Triton is.
    """
    try:
        triton, numpy = metadata.version("triton"), metadata.version("numpy")
    except metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed"
    if _number(triton) < (3, 7) and _number(numpy) >= (2, 4):
        return f"the interpreter of triton {triton} fails with numpy {numpy}; install numpy<2.4 or triton>=3.7"
    return None


def _number(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
