"""The reading bill: what a reader opens to follow `or1 train` to the optimizer step, in calls and in lines."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

# Each function calls the next.
CALLS = (
    ("or1/cli.py", "main"),
    ("or1/commands/train.py", "run"),
    ("or1/commands/train.py", "launch"),
    ("or1/trainer.py", "Trainer.run"),
    ("or1/trainer.py", "Trainer.learn"),
    ("or1/train/update.py", "update"),
    ("or1/train/optim.py", "MasterAdamW.step_if_finite"),
)
# One update from its rollout on: the algorithm, without row packing, the engine, and the head.
FILES = (
    "or1/trainer.py",
    "or1/magic/selection.py",
    "or1/magic/advantage.py",
    "or1/magic/entropy.py",
    "or1/magic/denominator.py",
    "or1/train/rank_rows.py",
    "or1/train/score.py",
    "or1/train/update.py",
    "or1/train/optim.py",
    "or1/model/forward.py",
)
MAX_CALLS, MAX_LINES, MAX_TRAINER = 6, 900, 130


def function(path: Path, name: str) -> ast.AST:
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        node = next(
            each
            for each in ast.iter_child_nodes(node)
            if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == part
        )
    return node


def called(node: ast.AST) -> set[str]:
    """Return the last names of everything that a function calls."""
    found = set()
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            target = call.func
            found.add(target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", ""))
    return found


def test_the_optimizer_step_is_six_calls_from_the_command(root: Path) -> None:
    for (path, name), (_, target) in itertools.pairwise(CALLS):
        assert target.rpartition(".")[2] in called(function(root / path, name)), f"{name} does not call {target}"
    print(" -> ".join(name for _, name in CALLS), f": {len(CALLS) - 1} calls")
    assert len(CALLS) - 1 <= MAX_CALLS


def test_one_update_is_read_in_900_lines(root: Path) -> None:
    lines = {path: len((root / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    print(*(f"{count:5} {path}" for path, count in lines.items()), f"{sum(lines.values()):5} in all", sep="\n")
    assert lines["or1/trainer.py"] <= MAX_TRAINER
    assert sum(lines.values()) <= MAX_LINES
