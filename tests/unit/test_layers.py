"""The import graph: lower layers never import higher ones, and heavy libraries stay out of where they do not belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

# Lower number = lower layer. A module may import its own layer and below.
LAYERS = {
    "or1": 0,
    "or1.core.types": 1, "or1.config": 1, "or1.config.load": 1, "or1.core.text": 1, "or1.report.records": 1,
    "or1.reward.terms": 1, "or1.core.terminal": 1,
    "or1.magic.advantage": 2, "or1.magic.filters": 2, "or1.magic.entropy": 2, "or1.magic.stages": 2, "or1.model.row_plan": 2, "or1.model.rows": 2,
    "or1.core.faults": 2, "or1.magic.unknown_logp": 2, "or1.core.codec": 2, "or1.commands.stop_request": 2,
    "or1.dist.world": 3, "or1.dist.fsdp": 3, "or1.dist.ulysses": 3, "or1.run.checkpoint_writer": 3, "or1.dist.watchdog": 4,
    "or1.commands.ckpt": 5, "or1.report.rank_display": 5, "or1.dist.local_ranks": 6, "or1.commands.replay": 6,
    "or1.commands.restarts": 6, "or1.run.lock": 5,
    "or1.run.marks": 3, "or1.model.seal": 3, "or1.run.places": 3, "or1.run.resume": 5,
    "or1.model.shared_prompts": 2, "or1.magic.tensors": 2, "or1.config.changes": 2,
    "or1.model.source": 2, "or1.model.attention": 3, "or1.model.soft_attention": 2, "or1.model.load": 3, "or1.train.optim": 3, "or1.data": 3,
    "or1.model.memory": 3, "or1.train.adam": 3, "or1.model.folder": 3, "or1.model.isolation": 3, "or1.dist.oom_retry": 3, "or1.dist.oom_peers": 3,
    "or1.magic.denominator": 2, "or1.magic.plateau": 2, "or1.magic.shaping": 2, "or1.magic.alarms": 2, "or1.magic.selection": 2,
    "or1.magic.empty_steps": 2,
    "or1.run.checkpoint": 3, "or1.run.metrics_log": 3, "or1.integrations": 3,
    "or1.run.rollout_log": 3, "or1.reward": 3, "or1.reward.code": 3, "or1.reward.code.inside": 3,
    "or1.rollout": 3, "or1.report.live": 3, "or1.report.console": 2, "or1.report.panel": 3, "or1.report.summary_text": 3, "or1.run.message_log": 3,
    "or1.run.in_flight": 3, "or1.train.rollout_queue": 4, "or1.train.engine_check": 4, "or1.commands.doctor": 6, "or1.commands.environment": 1, "or1.core.files": 1,
    "or1.run.directory": 4, "or1.train.metrics": 4, "or1.eval.accuracy": 4, "or1.report.page": 4, "or1.report.page_data": 4,
    "or1.report.page_charts": 4, "or1.report.page_plots": 4, "or1.report.page_samples": 4, "or1.report.page_style": 4,
    "or1.report.summary": 4, "or1.plan": 4,
    "or1.offline": 5, "or1.data.fingerprint": 5, "or1.eval.target": 6, "or1.commands.eval": 6, "or1.commands.filter": 6,
    "or1.train.update": 4, "or1.trainer": 5, "or1.commands.dry_run": 5, "or1.commands.train": 6, "or1.commands.hints": 1, "or1.cli": 7,
    "or1.__main__": 8,
}  # fmt: skip
ONLY_WHERE_USED = {"vllm", "wandb", "trl", "verl", "triton", "liger_kernel", "flash_attn"}
NO_TORCH = {"or1", "or1.core.types", "or1.core.files", "or1.config", "or1.config.rules", "or1.config.peers",
            "or1.config.paths", "or1.config.load", "or1.cli", "or1.commands.hints",
            "or1.core.terminal", "or1.__main__", "or1.reward.worker"}


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
