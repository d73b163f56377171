"""or1: a performance-first RL trainer for long chain-of-thought reasoning models with verifiable rewards.

    from or1 import train, evaluate, plan

    run = train("config.toml", {"optim.lr": 1e-4})

`or1.commands.notebook` documents the three functions. Importing or1 loads none of the large libraries; a call does.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from or1.commands.notebook import Run, evaluate, plan, train

__all__ = ["Run", "__version__", "evaluate", "plan", "train"]

_FUNCTIONS = ("evaluate", "plan", "train")


class _CallableRoom(ModuleType):
    """A package that can be called as the function of its name.

    The functions `train` and `plan` share their names with the rooms or1/train and or1/plan. Whichever module was
    imported first, `or1.train` is the room, so that the room has to be the function too.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self.__name__)(*args, **kwargs)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]  # what help() and a notebook's `train?` show
        return _function(self.__name__).__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function(self.__name__))


def _function(name: str) -> Any:
    from or1.commands import notebook

    return getattr(notebook, name.removeprefix("or1."))


def __getattr__(name: str) -> Any:
    """Return `evaluate` or `Run` at their first use. Raises AttributeError for other names."""
    if name in __all__:
        from or1.commands import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module 'or1' has no attribute {name!r}; it has {', '.join(_FUNCTIONS)}")


def _make_rooms_callable() -> None:
    # Both packages hold a docstring and nothing else, so that importing them costs nothing.
    from importlib import import_module

    for room in ("or1.plan", "or1.train"):
        import_module(room)
        sys.modules[room].__class__ = _CallableRoom


_make_rooms_callable()
