"""What a person reads after `pytest benchmarks/`: tables, a sentence true of the numbers, no failure by other load."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conftest import settle
from benchmarks.head.variants import VARIANTS
from benchmarks.lib import conclusion, load, plots, style, tables
from benchmarks.lib.load import MET, MISSED, NOT_JUDGED, Probe, Target

IDLE = Probe((0.010, 0.0102, 0.0105), 1.9)
UPPER = Target("fp32: time over the GEMMs", 1.12, 1.05)


def measured(variant: str, ms: float, mib: float = 10.0, **more: Any) -> dict[str, Any]:
    """Return a row of the head as benchmarks.head.cases.row makes it."""
    row = {"shape": "small", "tokens": 512, "hidden": 256, "vocab": 16384, "logits": "peaked", "masked": 0.0}
    row |= {"dtype": "float32", "tf32": False, "variant": variant, "task": "policy", "ms": ms, "gemms_ms": 20.0}
    row |= {"to_gemms": ms / 20, "peak_extra_gib": mib / 1024, "ms_all": [ms], "tflops": 1.0}
    row["error"] = {"logp": 2e-5, "entropy": 1e-6, "dhidden": 3e-6, "dweight": 4e-6}
    return row | more


def printed(show: Any, *args: Any) -> list[str]:
    """Return the lines that a function of tables prints into a log."""
    console = tables.console(io.StringIO(), terminal=False)
    show(console, *args)
    return console.file.getvalue().splitlines()


def test_a_setting_is_one_table_sorted_by_time_with_or1_marked() -> None:
    rows = [
        measured("naive torch", 50.0, 160.0),
        measured("or1", 25.0, 8.0),
        measured("torch linear_cross_entropy", 30.0, task="ce", error={"logp": None, "dhidden": 1e-7, "dweight": 9e-7}),
        measured("Liger FL-GRPO", 24.0),
        measured("or1", 100.0, tokens=1024, masked=0.5),
    ]
    lines = printed(tables.show_head, rows)
    assert max(map(len, lines)) <= tables.WIDTH
    assert sum("variant" in line for line in lines) == 2, "one table a setting"
    header = next(line.split() for line in lines if "variant" in line)
    assert " ".join(header) == "variant ms x GEMMs x naive extra MiB error logp error grad"
    cells = [line.split() for line in lines]
    assert ["Liger", "FL-GRPO", "24.0", "1.20", "0.48", "10.0", "2e-05", "4e-06"] in cells
    assert [">", "or1", "25.0", "1.25", "0.50", "8.0", "2e-05", "4e-06"] in cells
    assert ["naive", "torch", "50.0", "2.50", "1.00", "160.0", "2e-05", "4e-06"] in cells
    order = [next(i for i, line in enumerate(lines) if name in line) for name in ("FL-GRPO", "> or1", "naive torch")]
    assert order == sorted(order)
    # Naive torch did not run this task, and the variant returns no log-probs.
    assert ["torch", "linear_cross_entropy", "30.0", "1.50", "-", "10.0", "-", "9e-07"] in cells
    assert any("1,024 tokens" in line and "50% masked" in line for line in lines)


def test_the_longest_names_fit_into_100_columns() -> None:
    rows = [measured(name, 123456.7, 98765.4, task=task) for name, v in VARIANTS.items() for task in v.tasks]
    lines = printed(tables.show_head, [r | {"shape": "1.5B", "tokens": 32768, "tf32": True} for r in rows])
    assert max(map(len, lines)) <= tables.WIDTH
    assert all(any(name in line for line in lines) for name in VARIANTS), "a name was cut"
    assert not any("\u2026" in line for line in lines)


def test_other_tables_have_one_group_each_and_mark_or1() -> None:
    rows = [
        {"packer": packer, "sequences": count, "tokens": 9, "rows": 3, "empty": 0.25, "ms": ms}
        for count in (256, 4096)
        for packer, ms in (("in order (Python)", 2.0), ("or1 best fit (C++)", 1.0))
    ]
    lines = printed(tables.show_plain, "packing", rows)
    assert [line.split()[0] for line in lines if "(" in line] == [">", "in", ">", "in"]
    assert any("sequences 4,096" in line for line in lines)


def test_each_reason_of_a_skip_is_printed_once_with_its_remedy() -> None:
    skipped = {"TRL chunked": "not installed: pip install trl", "TRL default": "not installed: pip install trl"}
    lines = printed(tables.show_skipped, skipped | {"CCE": "needs a GPU"})
    assert [line.strip() for line in lines[1:]] == [
        "TRL chunked; TRL default: not installed: pip install trl",
        "CCE: needs a GPU",
    ]


def test_an_absent_peer_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("liger_kernel", "verl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    cpu = torch.device("cpu")
    assert VARIANTS["Liger FL-GRPO"].why_not(cpu) == "not installed: pip install liger-kernel"
    assert VARIANTS["verl torch"].why_not(cpu) == "not installed: pip install verl"
    assert "needs a GPU" in VARIANTS["CCE"].why_not(cpu)


@pytest.mark.parametrize(
    ("or1", "naive", "words"),
    [(25.0, 50.0, ("0.50 x the time", "less in 1 of 1")), (75.0, 50.0, ("1.50 x the time", "less in 0 of 1"))],
)
def test_the_sentence_is_true_when_or1_wins_and_when_it_loses(or1: float, naive: float, words: tuple[str, str]) -> None:
    said = conclusion.of_head([measured("or1", or1, 8.0), measured("naive torch", naive, 160.0)])
    assert said is not None and all(word in said for word in words)
    assert f"{or1 / 20:.2f} x the time of the bare GEMMs" in said
    assert "0.050 x its extra memory" in said and "no peer was measured" in said
    assert said.endswith(".") and said.count(". ") == 0, "one sentence"


def test_the_sentence_counts_settings_and_faster_peers() -> None:
    rows = []
    for tokens, or1, trl in ((512, 30.0, 40.0), (1024, 60.0, 50.0)):
        rows += [measured("or1", or1, tokens=tokens), measured("naive torch", 50.0, tokens=tokens)]
        # or1's own variants and other tasks are no peers of the policy loss.
        rows += [measured("or1 lean", 1.0, tokens=tokens), measured("QuACK", 1.0, tokens=tokens, task="ce")]
        rows += [measured("TRL chunked", trl, tokens=tokens)]
    said = conclusion.of_head(rows)
    assert said is not None and "0.60 to 1.20 x the time of naive torch" in said and "less in 1 of 2" in said
    assert "a peer is faster in 1 of 2 (TRL chunked)" in said
    assert "no peer is faster" in (conclusion.of_head(rows[:5]) or "")


def test_the_sentence_without_naive_torch_and_without_rows() -> None:
    said = conclusion.of_head([measured("or1", 24.0)])
    assert said is not None and "1.20 x the time of the bare GEMMs" in said and "naive torch was not measured" in said
    assert conclusion.of_head([]) is None and conclusion.of_packing([]) is None


def test_the_sentence_tells_targets_and_load() -> None:
    rows = [UPPER.row(None), UPPER.row("load average 9.0 on 2 CPUs"), Target("memory", 9.4, 8, at_least=True).row(None)]
    said = conclusion.of_head([], rows, "load average 9.0 on 2 CPUs")
    assert said is not None and said.startswith("Targets met: 1 of 3")
    assert "missed: fp32: time over the GEMMs (1.12, at most 1.05)" in said
    assert "not judged: fp32: time over the GEMMs" in said and "the machine was busy (load average 9.0" in said
    lines = " ".join(" ".join(printed(tables.show_targets, rows)).split())
    assert "missed" in lines and "not judged: the machine was busy" in lines and "at least 8" in lines


def test_the_sentence_on_packing() -> None:
    rows = [
        {"packer": name, "sequences": 256, "empty": empty, "ms": ms}
        for name, empty, ms in (("or1 best fit (C++)", 0.02, 1.0), ("in order", 0.2, 3.0), ("first fit", 0.03, 4.0))
    ]
    said = conclusion.of_packing(rows)
    assert said is not None and "2.0%" in said and "first fit leaves 3.0%, in 0.25 x the time" in said


def test_an_idle_machine_is_not_called_busy() -> None:
    assert load.why_busy(IDLE, IDLE, {"or1": [1.0, 1.05, 1.1]}, cpus=2) is None


@pytest.mark.parametrize(
    ("after", "repeats", "word"),
    [
        (Probe(IDLE.gemm_s, 3.4), {}, "load average 3.4 on 2 CPUs"),
        (Probe((0.013, 0.0131, 0.0135), 1.9), {}, "1.30 x"),
        (Probe((0.007, 0.0071, 0.0075), 1.9), {}, "0.70 x"),
        (Probe((0.010, 0.015, 0.016), 1.9), {}, "the calibration GEMM took 1.50 x its best"),
        (IDLE, {"or1": [1.0, 1.5, 1.4], "gemms": [1.0, 1.0]}, "or1 took 1.40 x its best"),
    ],
)
def test_each_sign_of_other_load_is_named(after: Probe, repeats: dict[str, list[float]], word: str) -> None:
    assert word in (load.why_busy(IDLE, after, repeats, cpus=2) or "")


def test_a_probe_measures_this_machine() -> None:
    probe = load.probe()
    assert len(probe.gemm_s) > 3 and min(probe.gemm_s) > 0 and probe.load >= 0


def test_only_a_missed_time_is_excused_by_other_load() -> None:
    memory = Target("memory", 7.0, 8, at_least=True, timed=False)
    assert [UPPER.verdict(None), UPPER.verdict("load"), UPPER.verdict("load", strict=True)] == [
        MISSED,
        NOT_JUDGED,
        MISSED,
    ]
    assert memory.verdict("load") == MISSED
    assert Target("time", 1.0, 1.05).verdict("load") == MET
    assert Target("time", float("nan"), 1.05).verdict(None) == MISSED


def test_a_missed_target_fails_and_an_unjudged_one_skips() -> None:
    settle([Target("time", 1.0, 1.05).row("load")])
    with pytest.raises(pytest.skip.Exception, match="not judged: the machine was busy"):
        settle([UPPER.row("load")])
    with pytest.raises(pytest.fail.Exception, match=r"1\.12, at most 1\.05"):
        settle([UPPER.row("load"), UPPER.row("load", strict=True)])


def test_plots_have_the_reports_colours_and_labels_that_do_not_overlap(tmp_path: Path) -> None:
    assert set(style.COLORS) >= {"s1", "ink", "grid", "card"} and style.OURS == "#2a78d6"
    assert not [v for v in style.rc().values() if isinstance(v, str) and v.startswith(("#0a00", "#0b00"))]
    assert style.spaced([0.5, 0.1, 0.51, 0.5], 0.1) == pytest.approx([0.5, 0.1, 0.7, 0.6])
    rows = [measured(name, ms * t, tokens=512 * t) for t in (1, 2) for name, ms in (("or1", 25), ("naive torch", 50))]
    # A call may need no extra memory, which a logarithmic axis cannot show.
    rows.append(measured("or1", 99.0, mib=0.0, tokens=2048))
    path = plots.plot_head(tmp_path / "head.png", rows)
    assert path is not None and path.stat().st_size > 10_000
    assert plots.plot_head(tmp_path / "none.png", rows[:1]) is None


@pytest.mark.slow
def test_the_benchmarks_end_with_a_table_and_a_sentence(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/packing", "--bench-out", str(tmp_path)]
    # pytest-benchmark measures nothing in a process that takes itself for a worker of xdist.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200, env=plain)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "> or1 best fit (C++)" in done.stdout and "or1's packer leaves" in done.stdout
    assert "Legend" not in done.stdout, "the table of pytest-benchmark"
    assert len(json.loads((tmp_path / "packing.json").read_text())["rows"]) == 6
