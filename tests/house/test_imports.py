"""The rule of the house: who may import whom, and what may be loaded where. docs/architecture.md explains the rooms."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.sources import nodes_of, tree_of

# From the top down. A room imports rooms below it, never one above.
ROOMS = (
    "cli",
    "commands",
    "trainer",
    "plan",
    "report",
    "train",
    "tune",
    "eval",
    "run",
    "environment",
    "rollout",
    "model",
    "data",
    "integrations",
    "magic",
    "reward",
    "dist",
    "config",
    "core",
)
TOP_FILES = {"__init__", "__main__", "cli", "trainer"}
# The only rooms of or1 that these import.
NARROW = {"integrations": {"magic"}, "core": set()}
# Nothing below these may import them; commands and benchmarks do.
ANNEXES = {"plan": {"cli", "commands"}, "integrations": set()}
HEAVY = {"torch", "transformers", "pyarrow", "matplotlib", "or1_kernels"}
# Libraries that a room's modules may import at their top, of HEAVY; a room that is not named may import all of them.
LIGHT = {"core": set(), "config": set(), "cli": set(), "commands": set(), "reward": set(), "data": {"pyarrow"}}
ONLY_WHERE_USED = {"vllm", "wandb", "trl", "verl", "triton", "liger_kernel", "flash_attn", "peft", "bitsandbytes"}
ONLY_WHERE_USED |= {"verifiers"}
# Modules made of a library's classes, which another module imports where the library is used.
MADE_OF = {f"or1.environment.{name}": {"verifiers"} for name in ("chat", "host", "tasks")}
MAX_ARROWS, MAX_FLOORS = 100, 12


@cache
def modules(root: Path) -> dict[str, Path]:
    """Return every module of or1 by its dotted name."""
    found = {}
    for path in sorted((root / "or1").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Return the names that a file imports; `top_level_only` leaves out functions and TYPE_CHECKING."""
    names: set[str] = set()
    for node in tree_of(path).body if top_level_only else nodes_of(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@cache
def file_arrows(root: Path) -> dict[str, set[str]]:
    """Return the modules of or1 that each module imports."""
    known = modules(root)
    arrows: dict[str, set[str]] = {}
    for module, path in known.items():
        found = {name for name in imports(path) if name in known and name not in ("or1", module)}
        # `from or1.model import attention` names the module, not the package's face.
        arrows[module] = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    return arrows


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@cache
def room_arrows(root: Path) -> dict[str, set[str]]:
    """Return the rooms that the modules of each room import."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, targets in file_arrows(root).items():
        rooms[room_of(module)] |= {room_of(target) for target in targets} - {room_of(module)}
    return rooms


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of each room: one above the highest floor that it imports.

    Fails where imports form a circle.
    """
    floor: dict[str, int] = {}

    def of(name: str, path: tuple[str, ...] = ()) -> int:
        assert name not in path, f"a circle of imports: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in floor:
            floor[name] = 1 + max((of(target, (*path, name)) for target in arrows.get(name, ())), default=0)
        return floor[name]

    for name in arrows:
        of(name)
    return floor


def test_the_top_of_or1_holds_the_algorithm_and_the_command(root: Path) -> None:
    entries = {p.stem for p in (root / "or1").glob("*.py")}
    assert entries == TOP_FILES
    folders = {p.parent.name for p in (root / "or1").glob("*/__init__.py")}
    assert folders == set(ROOMS) - TOP_FILES


def test_imports_go_down_the_list_only(root: Path) -> None:
    rank = {room: i for i, room in enumerate(ROOMS)}
    up = []
    for module, targets in file_arrows(root).items():
        room = room_of(module)
        if room in ("__init__", "__main__"):
            continue
        for target in targets:
            other = room_of(target)
            if rank[other] < rank[room] or (other != room and other not in NARROW.get(room, set(ROOMS))):
                up.append(f"{module} imports {target}")
            if room not in ANNEXES.get(other, set(ROOMS)) and other != room:
                up.append(f"{module} imports {target}, which only {ANNEXES[other]} may")
    assert not up


def test_no_circles_few_arrows_and_few_floors(root: Path) -> None:
    arrows = room_arrows(root)
    count = sum(len(targets) for room, targets in arrows.items() if room not in ("__init__", "__main__"))
    height = max(floors(arrows).values())
    tallest = max(floors(file_arrows(root)).values())
    print(f"{len(ROOMS)} rooms, {count} arrows between them, {height} floors; files stand on {tallest}")
    assert count <= MAX_ARROWS
    assert height <= MAX_FLOORS


def test_kernels_never_import_or1(root: Path) -> None:
    paths = list((root / "kernels" / "or1_kernels").rglob("*.py"))
    assert len(paths) > 4
    for path in paths:
        assert not {n for n in imports(path) if n.split(".")[0] == "or1"}, f"{path.name} imports or1"


def test_optional_libraries_are_imported_only_where_used(root: Path) -> None:
    for module, path in modules(root).items():
        found = {n.split(".")[0] for n in imports(path, top_level_only=True)} & ONLY_WHERE_USED - MADE_OF.get(
            module, set()
        )
        assert not found, f"{module} imports {found} at its top; import it in the function that needs it"


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_load_no_heavy_library(room: str, root: Path) -> None:
    known = [(module, path) for module, path in modules(root).items() if room_of(module) == room]
    assert known
    for module, path in known:
        found = {n.split(".")[0] for n in imports(path, top_level_only=True)} & HEAVY - LIGHT[room]
        assert not found, f"{module} imports {found} at its top; import it in the function that needs it"


def test_the_kernels_folder_is_not_a_package(root: Path) -> None:
    # With an __init__.py it would shadow the PyPI package `kernels`, which transformers looks for.
    assert not (root / "kernels" / "__init__.py").exists()
