"""Importing one module of a peer without the dependencies that its package's __init__ asks for."""

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType


@cache
def load(module: str, *bare: str) -> ModuleType:
    """The module, imported with the packages `bare` present as folders only, unless they are imported already.

    verl's __init__ starts by importing ray, which its kernels do not use. Raises ImportError.
    """
    added = [name for name in bare if name not in sys.modules]
    try:
        for name in added:
            sys.modules[name] = _folder_only(name)
        return importlib.import_module(module)
    finally:
        # Whoever imports the package by its own name afterwards gets all of it.
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
