"""benchmarks.step: every engine does the same step, and or1 does it faster than TRL's trainer."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _from_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.chdir(root)


def test_or1_and_plain_transformers_take_the_same_step() -> None:
    from benchmarks.step.batch import ragged_batch
    from benchmarks.step.engines import make_engine

    sequences = ragged_batch(64, 2, 12, 4096)
    cpu = torch.device("cpu")
    ours = make_engine("or1", "tiny", sequences, cpu, row_tokens=128)
    theirs = make_engine("plain", "tiny", sequences, cpu, micro_batch=3)
    for _ in range(2):
        a, b = ours.step(), theirs.step()
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert a.entropy == pytest.approx(b.entropy, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    weights = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    # Adam's first steps are the sign of the gradient: where that is 0 but for rounding, weights part by 2 lr a step.
    assert all((x - y).abs().max() < 5e-6 for x, y in weights)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_failed_case_keeps_the_others_and_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.step import suite as step

    engines = (step.EngineSpec("or1", "or1", {}),)
    good = step.Case("cpu", "tiny", 48, 1, 8, 0, engines)
    bad = step.Case("cpu", "no-such-model", 48, 1, 8, 0, engines)
    monkeypatch.setattr(step, "cases_of", lambda part: iter([[bad, good], [good]]))
    out = tmp_path / "step.json"
    results = step.run_parts(["cpu"], out, case_s=120, total_s=240)
    assert json.loads(out.read_text()) == json.loads(json.dumps(results))
    # A chain ends with its first failure; the next chain still runs.
    assert [("error" in r["result"]) for r in results] == [True, False]
    assert "no-such-model" in results[0]["result"]["error"]
    header, first, second = step.table(results)
    assert header == step.HEADER and "exit status 1" in first[3] and float(second[3]) > 0 and second[7] == "1.00x"
    assert results[1]["result"]["stamp"]["versions"]["torch"] == metadata.version("torch")


def test_useful_flops_count_the_weights_of_a_real_model() -> None:
    from benchmarks.step.batch import ARCHITECTURES, make_model, one_long_sequence, useful_flops

    model = make_model("tiny", torch.float32, torch.device("meta"), "sdpa")
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    a, (sequence,) = ARCHITECTURES["tiny"], one_long_sequence(1024, 4096)
    tokens, trained = sequence.packed_tokens, sequence.trained_tokens
    scores = 6 * a["num_hidden_layers"] * a["hidden_size"] * tokens**2
    expected = 6 * (matrices * tokens + a["vocab_size"] * a["hidden_size"] * trained) + scores
    assert useful_flops("tiny", [sequence]) == pytest.approx(expected)


def test_break_even_is_where_sharing_stays_faster() -> None:
    from benchmarks.prefix.shared_prompts import break_even

    rows = [{"saved": s, "speedup": v} for s, v in ((0.01, 1.1), (0.1, 0.9), (0.2, 1.05), (0.5, 1.6))]
    assert break_even(rows) == 0.2
    assert break_even([{"saved": 0.5, "speedup": 0.9}]) is None


@pytest.mark.nightly
@pytest.mark.slow
def test_the_step_is_1_5_times_as_fast_as_trls_with_the_same_loss() -> None:
    pytest.importorskip("trl")
    from benchmarks.step import suite as step

    (case, *_) = step.cases_of("cpu")
    result = step.run(case[0], limit_s=230)
    assert "error" not in result, result
    engines = result["engines"]
    ours = engines["or1"]
    for label, theirs in engines.items():
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), label
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5), label
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), label
    fastest = min(numbers["seconds"] for label, numbers in engines.items() if label.startswith("TRL"))
    print(f"TRL / or1: {fastest / ours['seconds']:.2f}")
    assert fastest / ours["seconds"] >= 1.5
