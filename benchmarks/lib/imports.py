"""Import of one module of a peer without the dependencies of its package's __init__."""

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType


@cache
def load(module: str, *bare: str) -> ModuleType:
    """Return the module, imported without running __init__ of the packages `bare` (unless already imported).

    For example, verl's __init__ imports ray, which verl's kernels do not use. Raises ImportError.
    """
    added = [name for name in bare if name not in sys.modules]
    try:
        for name in added:
            sys.modules[name] = _folder_only(name)
        return importlib.import_module(module)
    finally:
        # A later import of the package by name must get the whole package.
        for name in added:
            sys.modules.pop(name, None)


def _folder_only(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    return package
