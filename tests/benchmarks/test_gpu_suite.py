"""benchmarks.gpu without a GPU: order and limits of parts, what a stopped or lacking part leaves, predictions, page."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import bootstrap, page
from benchmarks.gpu.context import HARD_LIMIT_S, PARTS, QUICK, QUICK_S, SOFT_LIMIT_S, Context
from benchmarks.gpu.head import _checked_row
from benchmarks.gpu.predictions import PREDICTIONS, with_prediction
from benchmarks.head import cases as head
from benchmarks.head.variants import VARIANTS, Variant
from benchmarks.lib import interpreter
from benchmarks.lib.problems import Shape

CPU = torch.device("cpu")


def test_parts_are_in_the_order_of_a_first_hour_and_end_in_time() -> None:
    assert list(PARTS)[:6] == ["rows", "kernels", "attention", "head-7b", "head-8b", "step-7b"]
    assert SOFT_LIMIT_S < HARD_LIMIT_S < 8 * 60
    assert QUICK[0] == "head-7b" and sum(PARTS[name].quick_s for name in QUICK) <= QUICK_S == 300
    assert all(PARTS[name].quick_s for name in QUICK)


def test_quick_gives_the_rest_of_its_time_and_no_more() -> None:
    quick = argparse.Namespace(quick=True)
    now = time.monotonic()
    assert suite._limit(quick, "head-7b", now) == PARTS["head-7b"].quick_s
    assert 15 < suite._limit(quick, "head-7b", now - QUICK_S + 30) <= 30
    assert suite._limit(quick, "head-7b", now - QUICK_S) == 0
    assert suite._limit(argparse.Namespace(quick=False), "head-7b", now) == HARD_LIMIT_S


def test_an_unknown_part_is_named_with_the_known_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        suite.main([str(tmp_path), "--parts", "rows,hedd"])
    assert "no part hedd" in capsys.readouterr().err


SLOW_PART = """
import subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.context import Context
context = Context("rows", Path(sys.argv[1]), True, time.monotonic() + 100, [])
context.add({"pass": "copy", "ms": 1.0})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1], "child").write_text(str(child.pid))
time.sleep(600)
"""


@pytest.mark.slow
def test_a_stopped_part_keeps_its_rows_and_leaves_no_child(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "_command", lambda *_: [sys.executable, "-c", SLOW_PART, str(tmp_path)])
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    arguments = argparse.Namespace(out=tmp_path, rehearse=True)
    limit = 5.0
    while True:  # A loaded machine may need longer than this for its imports.
        result = suite._spawn("rows", arguments, environment, limit)
        if (tmp_path / "child").exists() or limit > 150:
            break
        limit *= 3
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == [{"pass": "copy", "ms": 1.0}]
    assert written["ended"] == result["ended"] == f"stopped after {limit:.0f} s"
    assert {"commit", "device", "driver", "cuda", "versions", "time"} <= set(written) and written["seconds"] >= limit
    pid = int((tmp_path / "child").read_text())
    # Killed with its parent: gone, or a zombie until its new parent looks.
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the part's child still runs")


@pytest.mark.slow
def test_a_part_without_its_library_says_so_in_one_line(root: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    for name in ("pydantic", "torchao"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")\n")
    environment = os.environ | {"PYTHONPATH": str(hidden)}
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--rehearse", "--parts", "step-7b,rows"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    lacking = json.loads((tmp_path / "step-7b.json").read_text())
    (row,) = lacking["rows"]
    assert "pydantic" in row["why"] and "wheels.txt" in row["why"] and "\n" not in row["why"]
    assert lacking["ended"].startswith("not run: cannot import pydantic")
    assert "Traceback" not in done.stdout + done.stderr + (tmp_path / "step-7b.log").read_text()
    assert json.loads((tmp_path / "rows.json").read_text())["ended"] == "passed"


@pytest.mark.slow
def test_only_parts_that_need_the_trainer_import_pydantic(root: Path) -> None:
    code = (
        "import sys; sys.modules['pydantic'] = None; sys.modules['torchao'] = None\n"
        "import importlib\n"
        "from benchmarks.gpu.context import PARTS\n"
        "[importlib.import_module(p.module) for p in PARTS.values() if 'pydantic' not in p.needs]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=200)


@pytest.mark.slow
def test_an_interrupted_suite_leaves_no_part_behind(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--rehearse", "--parts", "kernels"]
    suite_process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{suite_process.pid}/task/{suite_process.pid}/children")
    deadline = time.monotonic() + 200
    while not (tmp_path / "kernels.json").exists():
        assert time.monotonic() < deadline and suite_process.poll() is None
        time.sleep(0.2)
    (part,) = children.read_text().split()
    suite_process.terminate()
    assert suite_process.wait(60) == 128 + 15
    assert not Path(f"/proc/{part}").exists()


def test_a_machine_without_compiler_or_build_tools_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_imports", lambda module, environment: False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: None)
    assert bootstrap.build_native({}) == "not built: no C++ compiler (g++, clang++ or $CXX)"
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: "/usr/bin/g++")
    assert "pybind11" in bootstrap.build_native({})


def wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    """Write a wheel of these files."""
    info = f"{name}-1.0.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        for path, text in (files | meta).items():
            file.writestr(path, text)


@pytest.mark.slow
def test_wheels_are_installed_beside_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    line = "import sys, os, or1_deep; sys.path.insert(0, os.path.join(or1_deep.__path__[0], 'packages'))\n"
    files = {"or1_deep/__init__.py": "", "or1_deep/packages/or1_deep_inner.py": "", "or1_deep.pth": line}
    wheel(wheels, "or1_deep", files)
    environment = bootstrap.environment(wheels, tmp_path)
    # The .pth file of a wheel is read too: nvidia-cutlass-dsl keeps its package behind one.
    assert bootstrap._imports("or1_deep_inner", environment)
    assert "not installed: broken-1.0" in capsys.readouterr().err


def test_every_needed_wheel_is_listed(root: Path) -> None:
    lines = (root / "benchmarks/gpu/wheels.txt").read_text().splitlines()
    names = {line.split("==")[0].replace("-", "_") for line in lines if line and not line.startswith("#")}
    assert {"pydantic", "pydantic_core", "math_verify", "torchao", "liger_kernel"} <= names
    assert any("pip download" in line and "wheels.txt" in line for line in lines)


@pytest.mark.parametrize(
    ("triton", "numpy", "works"), [("3.6.0", "2.5.2", False), ("3.6.0", "2.3.5", True), ("3.9.0", "2.4.6", True)]
)
def test_the_interpreter_is_refused_with_the_versions(
    triton: str, numpy: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter.metadata, "version", lambda name: {"triton": triton, "numpy": numpy}[name])
    why = interpreter.why_not()
    assert why is None if works else (triton in why and numpy in why)


def test_the_7b_step_fits_an_80_gb_card() -> None:
    from benchmarks.step.suite import cases_of, fitted, or1_options

    options = or1_options("qwen2.5-7b")
    assert fitted(options, 150 << 30, torchao=True) == options
    small = fitted(options, 80 << 30, torchao=True)
    assert small["weights"] == "stochastic" and small["grad_dtype"] == "bfloat16"
    assert fitted(options, 80 << 30, torchao=False)["optimizer"] == "offload"
    assert fitted(or1_options("qwen2.5-1.5b"), 80 << 30, torchao=False)["optimizer"] == "adamw"
    first = [chain[0] for chain in cases_of("7b", quick=True)]
    assert [(c.context, c.documents, c.engines[0].name) for c in first] == [(32768, 1, "or1"), (32768, 4, "or1")]


def test_a_row_of_equal_documents_is_full() -> None:
    from benchmarks.step.batch import equal_documents

    made = equal_documents(1024, 4, 500)
    assert [s.packed_tokens for s in made] == [256] * 4


def test_a_variant_that_is_wrong_is_not_timed(tmp_path: Path) -> None:
    right = VARIANTS["or1"]

    def lie(p, task, hidden, weight):
        loss, logp, entropy = right.forward(p, task, hidden, weight)
        return 1.5 * loss, logp, entropy

    def nan(p, task, hidden, weight):
        loss, logp, entropy = right.forward(p, task, hidden, weight)
        return loss, logp * torch.nan, entropy

    setting = head.Setting(Shape("", 16, 301), 32)
    problem = setting.problem(CPU)
    context = Context("head-7b", tmp_path, True, time.monotonic() + 100, [])
    plain = head.error_of(VARIANTS["naive torch"], "policy", problem)
    for forward, word in ((lie, "dhidden"), (nan, "logp")):
        variant = Variant("peer", forward, ("policy",), lambda device: None)
        row = _checked_row(context, setting, variant, "policy", problem, plain)
        assert row["wrong"].startswith(word) and "ms" not in row and "ok" not in row
        own = Variant("or1 wrong", forward, ("policy",), lambda device: None)
        assert _checked_row(context, setting, own, "policy", problem, plain)["ok"] is False
    assert _checked_row(context, setting, right, "policy", problem, plain)["ms"] > 0


def test_a_peer_that_fails_is_skipped_and_or1_is_not(tmp_path: Path) -> None:
    def broken(p, task, hidden, weight):
        raise OSError("libfoo.so: cannot open")

    setting = head.Setting(Shape("", 16, 301), 32)
    context = Context("head-7b", tmp_path, True, time.monotonic() + 100, [])
    for name in ("peer", "or1"):
        variant = Variant(name, broken, ("policy",), lambda device: None)
        call = lambda v=variant: _checked_row(context, setting, v, "policy", setting.problem(CPU), {})  # noqa: E731
        if name == "or1":
            with pytest.raises(OSError, match="libfoo"):
                call()
        else:
            assert call() is None and "libfoo" in context.rows[-1]["why"]


ROW = {"pass": "row_sums", "impl": "triton", "rows": 4096, "ms": 0.9, "gb_per_s": 2000.0}


def test_predictions_stand_beside_the_measurement_and_are_marked() -> None:
    found = with_prediction(ROW, "rows", device="NVIDIA H200")
    assert found["ms"] == 0.9 and "0.75 to 0.88" in found["predicted"]["ms"]
    assert "predicted, not measured" in found["predicted"]["ms"] and "H100" not in found["predicted"]["ms"]
    assert "predicted" not in with_prediction(ROW, "rows", device="NVIDIA A100")
    assert "predicted" not in with_prediction(ROW | {"impl": "torch"}, "rows", device="NVIDIA H200")
    step = {"architecture": "qwen2.5-7b", "engine": "or1", "documents": 4, "row": 32768, "mfu": 0.4, "seconds": 4.0}
    found = with_prediction(step, "step-7b", device="NVIDIA H200")
    assert set(found["predicted"]) == {"mfu", "seconds"} and found["target"] == {"mfu": "at least 0.50"}
    assert {p.part for p in PREDICTIONS} <= set(PARTS)


def test_a_rehearsal_prints_no_prediction(tmp_path: Path) -> None:
    context = Context("rows", tmp_path, True, time.monotonic() + 100, [])
    context.add(dict(ROW))
    assert "predicted" not in json.loads((tmp_path / "rows.json").read_text())["rows"][0]


def gpu_run(out: Path) -> None:
    """Write files as a GPU run does."""
    stamp = {
        "commit": "abc",
        "device": "NVIDIA H200",
        "driver": "580.1",
        "cuda": "13.0",
        "versions": {"torch": "2.11.0"},
        "time": "2027-01-02T03:04:05Z",
        "rehearsal": False,
        "seconds": 12.0,
    }
    out.mkdir()
    rows = [with_prediction(ROW, "rows", device="NVIDIA H200"), {"skipped": "CCE", "why": "not installed"}]
    (out / "rows.json").write_text(json.dumps(stamp | {"part": "rows", "ended": "passed", "rows": rows}))
    checks = [{"check": "bit for bit", "ok": False}, {"check": "same", "ok": True}]
    ended = {"part": "kernels", "ended": "stopped after 420 s", "rows": checks}
    (out / "kernels.json").write_text(json.dumps(stamp | ended))
    suite._not_run("train", out)


def test_the_page_is_written_from_json(tmp_path: Path) -> None:
    folder, out = tmp_path / "results", tmp_path / "out"
    assert page.main(["--folder", str(folder)]) == 0
    assert "No GPU run is recorded yet" in (folder / "README.md").read_text()
    gpu_run(out)
    assert page.main([str(out), "--folder", str(folder)]) == 0
    assert (folder / "2027-01-02-nvidia-h200" / "rows.json").exists()
    text = (folder / "README.md").read_text()
    assert "No GPU run" not in text and "## NVIDIA H200, 2027-01-02" in text and "driver 580.1" in text
    assert "| row_sums | triton | 4096 | 0.9 | 2000 | ms: 0.75 to 0.88 (H200, predicted, not measured" in text
    assert "1 of 2 checks hold" in text and "- failed: bit for bit" in text and "stopped after 420 s" in text
    assert "- skipped: CCE: not installed" in text and "### train: not run: out of time, 0 s" in text


def test_the_page_takes_no_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "results", tmp_path / "out"
    Context("rows", out, True, time.monotonic() + 100, []).add(dict(ROW))
    assert page.main([str(out), "--folder", str(folder)]) == 1
    assert "did not run on a GPU" in capsys.readouterr().err and not folder.exists()


def test_the_page_of_the_repository_is_what_its_json_gives(root: Path) -> None:
    assert (root / "benchmarks/results/gpu/README.md").read_text() == page.page(page.FOLDER)
