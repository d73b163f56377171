"""The import graph: lower layers never import higher ones, and heavy libraries stay out of where they do not belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

# Lower number = lower layer. A module may import its own layer and below.
LAYERS = {
    "or1": 0,
    "or1.types": 1, "or1.config": 1, "or1.config_load": 1, "or1.humanize": 1, "or1.records": 1,
    "or1.reward_terms": 1, "or1.terminal": 1,
    "or1.advantage": 2, "or1.filters": 2, "or1.entropy": 2, "or1.stages": 2, "or1.balance": 2, "or1.pack": 2,
    "or1.faults": 2, "or1.engine_logp": 2, "or1.wire": 2, "or1.survival": 2,
    "or1.dist": 3, "or1.fsdp": 3, "or1.sequence_parallel": 3, "or1.checkpoint_writer": 3, "or1.watchdog": 4,
    "or1.checkpoint_tool": 5, "or1.rank_display": 5, "or1.local_ranks": 6, "or1.replay": 6,
    "or1.restarts": 6, "or1.run_lock": 5,
    "or1.run_marks": 3, "or1.exported": 3, "or1.run_places": 3, "or1.restore": 5,
    "or1.prefix": 2, "or1.magic": 2, "or1.run_changes": 2,
    "or1.model_source": 2, "or1.attention": 3, "or1.soft_attention": 2, "or1.model": 3, "or1.optim": 3, "or1.data": 3,
    "or1.memory": 3, "or1.moments": 3, "or1.model_folder": 3, "or1.isolation": 3, "or1.budget": 3, "or1.stand_in": 3,
    "or1.normalise": 2, "or1.plateau": 2, "or1.shaping": 2, "or1.alarms": 2, "or1.batches": 2,
    "or1.empty_steps": 2,
    "or1.checkpoint": 3, "or1.metrics": 3, "or1.integrations": 3,
    "or1.rollout_log": 3, "or1.reward": 3, "or1.reward.code": 3, "or1.reward.code.inside": 3,
    "or1.rollout": 3, "or1.display": 3, "or1.console": 2, "or1.panel": 3, "or1.summary_text": 3, "or1.run_log": 3,
    "or1.rollout_state": 3, "or1.feed": 4, "or1.parity": 4, "or1.doctor": 6, "or1.environment": 1, "or1.files": 1,
    "or1.run_state": 4, "or1.step_metrics": 4, "or1.evaluate": 4, "or1.report": 4, "or1.report_data": 4,
    "or1.report_charts": 4, "or1.report_plots": 4, "or1.report_samples": 4, "or1.report_style": 4,
    "or1.summary": 4, "or1.plan": 4,
    "or1.offline": 5, "or1.inputs": 5, "or1.offline.target": 6, "or1.eval_run": 6, "or1.filter_run": 6,
    "or1.update": 4, "or1.trainer": 5, "or1.dry_run": 5, "or1.launch": 6, "or1.cli_hints": 1, "or1.cli": 7,
    "or1.__main__": 8,
}  # fmt: skip
ONLY_WHERE_USED = {"vllm", "wandb", "trl", "verl", "triton", "liger_kernel", "flash_attn"}
NO_TORCH = {"or1", "or1.types", "or1.files", "or1.config", "or1.config.rules", "or1.config.peers",
            "or1.config.paths", "or1.config_load", "or1.cli", "or1.cli_hints",
            "or1.terminal", "or1.__main__", "or1.reward.worker"}


def modules(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted((root / "or1").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer_of(module: str) -> int:
    while module not in LAYERS:
        assert "." in module, f"{module} has no layer; add it to LAYERS"
        module = module.rpartition(".")[0]
    return LAYERS[module]


def imports(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_lower_layers_never_import_higher_ones(root: Path) -> None:
    known = modules(root)
    assert len(known) > 20
    for module, path in known.items():
        if path.name != "__init__.py" or module != "or1":
            assert module in LAYERS or module.rpartition(".")[0] in LAYERS, f"{module} has no layer"
        # The CLI imports inside functions; for everything else those count too.
        for name in imports(path, top_level_only=False):
            target = next((m for m in (name, name.rpartition(".")[0]) if m in known and m != "or1"), None)
            if target is not None:
                assert layer_of(target) <= layer_of(module), f"{module} imports {target} from a higher layer"


def test_kernels_never_import_or1(root: Path) -> None:
    paths = list((root / "kernels" / "or1_kernels").rglob("*.py"))
    assert len(paths) > 4
    for path in paths:
        assert not {n for n in imports(path, False) if n.split(".")[0] == "or1"}, f"{path.name} imports or1"


def test_optional_libraries_are_imported_only_where_used(root: Path) -> None:
    for module, path in modules(root).items():
        found = {n.split(".")[0] for n in imports(path, top_level_only=True)} & ONLY_WHERE_USED
        assert not found, f"{module} imports {found} at its top; import it in the function that needs it"


@pytest.mark.parametrize("module", sorted(NO_TORCH))
def test_light_modules_import_no_torch(module: str, root: Path) -> None:
    found = {n.split(".")[0] for n in imports(modules(root)[module], top_level_only=True)}
    assert not found & {"torch", "transformers", "pyarrow", "matplotlib", "or1_kernels"}


def test_the_kernels_folder_is_not_a_package(root: Path) -> None:
    # With an __init__.py it would shadow the PyPI package `kernels`, which transformers looks for.
    assert not (root / "kernels" / "__init__.py").exists()
