"""`from or1 import train, evaluate, plan`: the page's snippet runs in an empty folder; its results can be plotted."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import or1
from or1 import cli
from or1.commands import notebook
from or1.core.errors import ConfigError, RunError
from tests.helpers.small_run import ROOT

PAGE = ROOT / "docs" / "notebook.md"


def snippet() -> str:
    (found,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    return found


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder my-task of the page, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "my-task"]) == 0
    return tmp_path / "my-task"


@pytest.mark.slow
def test_the_snippet_of_the_page_runs(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = task / "config.toml"
    text = config.read_text().replace("prompts_per_step = 8", "prompts_per_step = 2")
    config.write_text(text.replace("group_size = 16", "group_size = 4") + "\n[log]\ntensorboard = false\n")
    names: dict[str, Any] = {}
    exec(compile(snippet().replace('"stage.0.steps": 20', '"stage.0.steps": 1'), str(PAGE), "exec"), names)
    run = names["run"]
    assert names["steps"] == [1] and len(names["rewards"]) == 1 and 0 <= names["rewards"][0] <= 1
    assert names["heldout"]["problems"] == 20 and 0 <= names["heldout"]["avg@1"] <= 1
    assert run.step == 1 and (run.weights / "model.safetensors").is_file() and run.report.is_file()
    assert [record["step"] for record in or1.Run(run.folder).metrics()] == [0, 1]
    assert json.loads((run.folder / "config.resolved.json").read_text())["optim"]["lr"] == 1e-4
    # The second call resumes. The first one has imported or1.train.build, which makes or1.train the package.
    assert or1.train(config, ["stage.0.steps=2"]).step == 2


def test_a_plan_needs_neither_data_nor_weights() -> None:
    config = ROOT / "examples" / "recipes" / "or1-math-7b.toml"
    wide, narrow = or1.plan(config, device="H100", gpus=32), or1.plan(str(config), device="A100-40G")
    assert wide.fits and not narrow.fits
    assert len(wide.stages) == 4 and all(stage.memory.peak.total > 0 for stage in wide.stages)
    # Twice the bytes of a weight.
    exact = or1.plan(config, {"model.dtype": "float32"}, device="H100", gpus=32)
    assert exact.heaviest.memory.peak.total > wide.heaviest.memory.peak.total


def test_overrides_are_a_mapping_or_the_words_after_set(task: Path) -> None:
    config = task / "config.toml"
    a = or1.plan(config, {"model.dtype": "float64", "run_dir": Path("x"), "eval.sets": []}, device="H100")
    b = or1.plan(config, ["model.dtype=float64", "run_dir=x", "eval.sets=[]"], device="H100")
    assert a.config == b.config and a.config.run_dir == "x" and a.config.eval.sets == ()
    numbers = {"data.train": [Path("rows.jsonl")], "seed": np.int64(3), "optim.lr": np.float32(0.5)}
    found = or1.plan(config, numbers, device="H100").config
    assert (found.data.train, found.seed, found.optim.lr) == (("rows.jsonl",), 3, 0.5)


def test_mistakes_are_errors_with_the_commands_words(task: Path) -> None:
    config = task / "config.toml"
    with pytest.raises(ConfigError, match=r"optim\.learning_rate"):
        or1.train(config, {"optim.learning_rate": 1e-4})
    with pytest.raises(ConfigError, match="a setting is text, a number, True, False or a list"):
        or1.train(config, {"optim.lr": None})
    with pytest.raises(ConfigError, match="no run and no checkpoint"):
        or1.evaluate(task / "tiny-adder" / "..")
    with pytest.raises(AttributeError, match="evaluate, plan, train"):
        _ = or1.trian


def test_a_series_leaves_out_steps_without_the_metric(tmp_path: Path) -> None:
    records = [{"step": 1, "a": 0.5}, {"step": 2, "a": None, "b/c": 3}, {"step": 3, "a": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    run = or1.Run(tmp_path)
    assert run.series("a") == ([1, 3], [0.5, 1]) and run.series("b/c") == ([2], [3])
    with pytest.raises(RunError, match="has the metric 'b/d'; name another metric, such as b/c"):
        run.series("b/d")
    assert run.step == 0 and run.weights is None and run.report is None


@pytest.mark.parametrize("name", ["train", "evaluate", "plan"])
def test_the_functions_are_typed_and_documented(name: str) -> None:
    given, function = getattr(or1, name), getattr(notebook, name)
    assert callable(given) and inspect.signature(given) == inspect.signature(function)
    assert inspect.getdoc(given) == inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    assert all(p.annotation is not p.empty and p.name in function.__doc__ for p in parameters.values())
    assert f"`{name}(" in PAGE.read_text(encoding="utf-8")


def test_importing_or1_loads_no_large_library() -> None:
    script = "import sys; from or1 import train, evaluate, plan; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
