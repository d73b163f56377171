"""What benchmark numbers rest on: masks, work counted, peers that compute the same, memory and files told truly."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.context import PARTS
from benchmarks.head import cases as head
from benchmarks.head.variants import VARIANTS
from benchmarks.lib import imports, measure, results, tables
from benchmarks.lib.problems import TASKS, Shape, errors, make_problem, truth
from or1_kernels import reference

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 64, 2048)


@pytest.mark.parametrize(("masked", "live"), [(0.0, 64), (0.5, 32)])
def test_masked_rows_are_the_start_of_each_document_and_weigh_nothing(masked: float, live: int) -> None:
    problem = make_problem(SHAPE, 64, masked=masked)
    assert len(problem.live) == live
    assert problem.token_weight.sum().item() == pytest.approx(1)
    by_document = problem.token_weight.view(problem.documents, -1)
    assert not by_document[:, : round(masked * 8)].any() and by_document[:, round(masked * 8) :].all()
    assert (problem.advantages.view(problem.documents, -1).std(1) == 0).all()


@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_work_is_that_of_the_bare_gemms_over_live_rows(masked: float) -> None:
    problem = make_problem(SHAPE, 64, masked=masked)
    gemms = head.bare_gemms(problem)
    with FlopCounterMode(display=False) as counter:
        gemms()
    assert problem.flops == counter.get_total_flops() == 6 * 64 * 2048 * (32 if masked else 64)


@pytest.mark.parametrize(("width", "vocab"), [(256, 4096), (64, 16384), (1536, 2048)])
def test_peaked_logits_have_a_trained_policys_entropy_and_frequencies(width: int, vocab: int) -> None:
    problem = make_problem(Shape("", width, vocab), 1024)
    with torch.no_grad():
        exact = SimpleNamespace(
            **dict(
                zip(
                    ("logp", "entropy"),
                    reference.logprob_entropy((problem.hidden @ problem.weight.T).double(), problem.targets),
                    strict=True,
                )
            )
        )
    assert 0.2 < exact.entropy.mean() < 0.4
    assert exact.entropy.median() < exact.entropy.mean(), "most rows must be nearly certain"
    # -logp of sampled tokens has the entropy as its mean.
    spread = (-exact.logp - exact.entropy).std() / 1024**0.5
    assert abs((-exact.logp - exact.entropy).mean()) < 4 * spread


def test_flat_logits_are_nearly_uniform() -> None:
    entropy = truth(make_problem(Shape("", 256, 8192), 64, logits="flat"), "ce").entropy
    assert abs(entropy.mean() - (torch.tensor(8192.0).log() - 0.5)) < 0.1
    with pytest.raises(ValueError, match="'randn'"):
        make_problem(SHAPE, 8, logits="randn")


@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize(("name", "task"), [(v.name, t) for v in VARIANTS.values() for t in v.tasks])
def test_every_variant_computes_the_tasks_gradient(name: str, task: str, masked: float) -> None:
    variant = VARIANTS[name]
    why = variant.why_not(CPU)
    if why is not None:
        pytest.skip(f"{name}: {why}")
    problem = make_problem(SHAPE, 64, masked=masked)
    got, want = variant.runner(problem, task)(), truth(problem, task)
    dead = problem.token_weight == 0
    assert not got.dhidden[dead].any()
    # grad_row_eps leaves out rows by its own rule; its bound has its own test.
    tolerance = 1e-3 if "eps" in name else 1e-5
    for field in ("dhidden", "dweight"):
        a, b = getattr(got, field).double(), getattr(want, field)
        assert (a - b).norm() <= tolerance * b.norm(), field
    for field in ("logp", "entropy"):
        if getattr(got, field) is not None:
            torch.testing.assert_close(
                getattr(got, field)[~dead].double(), getattr(want, field)[~dead], rtol=1e-5, atol=1e-4
            )


def test_a_sample_is_a_problem_of_live_rows() -> None:
    problem = make_problem(SHAPE, 64, masked=0.5)
    sample = problem.sample(10)
    assert len(sample.targets) == 10 and len(sample.live) == 10 and sample.documents == 1
    rows = {tuple(h.tolist()) for h in problem.hidden[problem.live]}
    assert all(tuple(h.tolist()) in rows for h in sample.hidden)
    assert len(problem.sample(10**6).targets) == 32


def test_errors_are_absolute_for_scores_and_relative_for_gradients() -> None:
    want = SimpleNamespace(
        logp=torch.tensor([-1.0]),
        entropy=torch.tensor([2.0]),
        dhidden=torch.full((4,), 2.0),
        dweight=torch.full((4,), 5.0),
    )
    got = SimpleNamespace(
        logp=torch.tensor([-1.5]), entropy=None, dhidden=torch.full((4,), 2.2), dweight=torch.full((4,), 5.0)
    )
    out = errors(got, want)
    assert out["logp"] == 0.5 and out["entropy"] is None and out["dweight"] == 0
    assert out["dhidden"] == pytest.approx(0.1, rel=1e-5)


def test_cpu_peak_counts_what_was_freed_and_nothing_else() -> None:
    size = 96 << 20
    kept = torch.ones(size // 4)  # in use before: not extra

    def temporary() -> float:
        return (kept + 1).sum().item()

    temporary()
    assert measure.peak_extra_bytes(temporary, CPU) == pytest.approx(size, rel=0.1)
    assert measure.peak_extra_bytes(lambda: kept.sum().item(), CPU) < size // 10


def test_interleaved_rounds_take_turns() -> None:
    order: list[str] = []
    times = measure.interleaved({n: lambda n=n: order.append(n) for n in "ab"}, CPU, rounds=2)
    assert order == list("ababab") and [len(t) for t in times.values()] == [2, 2]


def test_tf32_is_restored() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with measure.tf32(not before):
        assert torch.backends.cuda.matmul.allow_tf32 is not before
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_an_absent_peer_is_named_with_the_reason() -> None:
    with pytest.raises(ImportError, match="no_such_peer"):
        imports.load("no_such_peer.kernels", "no_such_peer")
    for variant in VARIANTS.values():
        why = head.why_skipped(variant, head.Setting(SHAPE, 8), CPU)
        assert why is None or any(word in why for word in ("import", "GPU", "installed"))
    huge = head.Setting(Shape("", 8, 152064), 32768)
    assert "GiB" in head.why_skipped(VARIANTS["naive torch"], huge, CPU)


def test_a_measured_row_reaches_table_and_json(tmp_path: Path) -> None:
    rows = []
    for tokens in (16, 32):
        setting = head.Setting(SHAPE, tokens)
        problem = setting.problem(CPU)
        rows.append(head.row(setting, VARIANTS["or1"], "policy", problem, times_s=[3.0, 2.0], gemm_times_s=[1.0, 4.0]))
    assert rows[0]["ms"] == 2000 and rows[0]["to_gemms"] == 2.0
    assert rows[0]["tflops"] == pytest.approx(6 * 16 * 64 * 2048 / 2 / 1e12)
    assert rows[0]["error"]["dweight"] < 1e-5
    written = json.loads(results.write_json(tmp_path / "head.json", rows).read_text())
    assert written["rows"] == rows and {"commit", "device", "versions", "time"} <= set(written)
    assert not list(tmp_path.glob("*.partial"))
    console = tables.console(io.StringIO(), terminal=False)
    tables.show_head(console, rows)
    text = console.file.getvalue()
    assert "2,000.0" in text and "32 tokens" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_gpu_script_says_so(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "no GPU" in done.stderr and "--rehearse" in done.stderr


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_runs_every_part_of_the_gpu_script(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--rehearse", "--wheels", str(wheels)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "not installed: broken-1.0" in done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert {r["part"]: r["ended"] for r in summary} == dict.fromkeys(PARTS, "passed")
    for name in PARTS:
        part = json.loads((tmp_path / f"{name}.json").read_text())
        assert part["rehearsal"] and part["rows"] and {"commit", "device", "versions"} <= set(part)
    checks = [r for r in json.loads((tmp_path / "kernels.json").read_text())["rows"] if "check" in r]
    assert len(checks) > 50 and all(r["ok"] for r in checks)
    assert TASKS[0] in {r.get("task") for r in json.loads((tmp_path / "head-7b.json").read_text())["rows"]}
