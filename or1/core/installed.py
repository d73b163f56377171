"""Check of the installation: two distributions hold the package or1_kernels, and pip knows of no conflict."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from or1 import __version__
from or1.core.errors import RunError

_VERSION = re.compile(r'^__version__ = "([^"]+)"', re.MULTILINE)


def require_kernels() -> None:
    """Raise RunError unless the package or1_kernels is there and has or1's version.

    Both or1 and or1-kernels install the package. The one that was installed last wins, and uninstalling either removes
    the files. The version is read as text, because importing or1_kernels loads torch.
    """
    spec = find_spec("or1_kernels")
    if spec is None or spec.origin is None:
        raise RunError(
            "the package or1_kernels is missing, for example because or1-kernels was uninstalled after or1; "
            f"run `pip install --force-reinstall --no-deps or1=={__version__}`, or in a clone `pip install -e .`"
        )
    found = _VERSION.search(Path(spec.origin).read_text(encoding="utf-8"))
    if found is None or found[1] != __version__:
        version = "without a version" if found is None else f"of version {found[1]}"
        raise RunError(
            f"or1 is {__version__}, but the package or1_kernels in {Path(spec.origin).parent} is {version}; run "
            f"`pip uninstall or1-kernels`, then `pip install --force-reinstall --no-deps or1=={__version__}`"
        )
