"""benchmarks.real: inputs of a model folder, errors of the head on them, and what grad_row_eps leaves out."""

from __future__ import annotations

import json
import os
import string
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.head import cases
from benchmarks.head.variants import VARIANTS
from benchmarks.lib.results import write_json
from benchmarks.real import heads, inputs, make, row_eps, text
from benchmarks.real.page import write_page
from benchmarks.step.batch import rollout
from benchmarks.step.case import run_case
from benchmarks.step.suite import model_cases, table

SIZES = make.Sizes(windows=3, length=16, groups=2, group_size=4, documents=8, tokens=6, questions=1, samples=4)


def save_random_model(folder: Path, **head: object) -> Path:
    """Save two random layers with a tokenizer of characters."""
    tokens = ["<pad>", "<eos>", *string.printable]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokens), eos_token_id=1, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    questions = model / "questions.jsonl"
    questions.write_text(json.dumps({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}) + "\n")
    path = model / "inputs" / "before.safetensors"
    make.make(str(model), path, name="random", pages=[questions] * 3, questions=questions, sizes=SIZES)
    return path


def test_the_files_scores_are_those_of_the_model(model: Path, file: Path) -> None:
    given = inputs.load(file)
    assert given.shape == (given.shape.__class__)("random", 32, 102)
    policy = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    documents = json.loads(make.rollouts_of(file).read_text())["addition"]
    section = given.sections["addition"]
    assert len(documents) == 8 and sum(d["advantage"] for d in documents) == pytest.approx(0, abs=1e-5)
    for row, document in enumerate(documents):
        count, start = len(document["response"]), len(document["prompt"])
        ids = torch.tensor([[*document["prompt"], *document["response"]]])
        with torch.no_grad():
            log_p = policy(ids).logits[0, start - 1 : -1].log_softmax(-1)
        want = log_p.gather(1, ids[0, start:, None])[:, 0]
        torch.testing.assert_close(section.logp[row, :count], want, rtol=1e-4, atol=1e-5)
        assert section.live[row].sum() == count and not section.hidden[row, count:].any()


def test_a_problem_has_the_live_rows_and_repeats_documents(file: Path) -> None:
    given = inputs.load(file)
    problem = given.problem("addition", 60)
    assert (problem.documents, len(problem.targets)) == (10, 60), "eight documents of six tokens, two of them twice"
    assert torch.equal(problem.hidden[48:], problem.hidden[:12])
    assert problem.token_weight.sum().item() == pytest.approx(1)
    assert not problem.token_weight[~given.sections["addition"].live.flatten()[:48].repeat(2)[:60]].any()
    with pytest.raises(ValueError, match="has text, addition, questions"):
        given.problem("poems")
    with pytest.raises(ValueError, match="a document of section 'text' has 16"):
        given.problem("text", 15)


def test_a_changed_file_is_refused(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="write or copy it again"):
        inputs.load(tmp_path / "changed.safetensors")
    (tmp_path / "short.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="no whole file"):
        inputs.load(tmp_path / "short.safetensors")
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.real\.make"):
        inputs.load(tmp_path / "absent.safetensors")


def test_or1_is_as_exact_as_plain_torch_on_real_inputs(file: Path) -> None:
    some = [v for v in heads.variants() if heads.is_or1(v.name) or v.name == heads.PLAIN]
    rows = heads.error_rows("before", inputs.load(file), list(inputs.load(file).sections), some, sample=12)
    assert len(rows) == 3 * 2 * 3 * 3
    assert {r["three_way"] for r in rows} == {"holds"}
    error = {"logp": float("nan"), "dweight": 0.5}
    plain, want = {"logp": 1.0, "dweight": 0.2}, SimpleNamespace(logp=torch.ones(1))
    why = heads.why_not_exact(error, plain, want, torch.float32)
    assert why == "logp nan, plain torch 1.0e+00; dweight 5.0e-01, plain torch 2.0e-01"


@pytest.mark.slow
def test_times_and_memory_are_of_every_task(file: Path) -> None:
    rows = heads.time_rows("before", inputs.load(file), ["addition"], [VARIANTS["or1"]], tokens=48, rounds=1)
    assert [(r["dtype"], r["task"]) for r in rows[:3]] == [("float32", task) for task in VARIANTS["or1"].tasks]
    assert all(r["cpu_s"] > 0 and r["live_rows"] <= r["rows"] == 48 for r in rows)


def test_the_bound_of_grad_row_eps_covers_what_is_left_out(file: Path) -> None:
    given = inputs.load(file)
    (all_rows,) = row_eps.rows("before", given, "addition", rounds=1, eps=(0.0,))
    # All advantages are 1 or -1, so half of the rows are below the median of 1 - p.
    rows = [all_rows, *row_eps.rows("before", given, "addition", rounds=1, eps=(all_rows["median_rest"], 1e3))]
    assert [r["share_left_out"] for r in rows] == [0, pytest.approx(0.5, abs=0.1), 1]
    for r in rows:
        assert r["true"] <= r["bound"] * (1 + 1e-4)
        assert r["elements_left_out"] == 102 * r["rows_left_out"]
    (bonus,) = row_eps.rows("before", given, "addition", task="policy", rounds=1, eps=(1e3,))
    assert 0.99 < bonus["true"] < bonus["bound"], "the bound on an entropy's gradient is not tight"
    assert rows[0]["dweight"] == rows[0]["exact_dweight"] < 1e-5
    assert rows[-1]["dweight"] == 1 and rows[-1]["true"] == pytest.approx(1)


def test_text_is_rows_of_jsonl_or_pages() -> None:
    documents, what = text.pages()
    assert len(documents) > 5 and "own pages" in what
    assert text.last_number("1 and 2,345.") == "2345" and text.last_number("none") == ""
    assert text.is_right("so 12 + 30 = 42.", "42") and not text.is_right("42 or 43", "42")
    assert text.additions(3) == text.additions(3) and len(text.additions(3)) == 3


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    model.config.logits_scaling = 8.0
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="logits_scaling; real inputs"):
        make.Reader(str(tmp_path))


def test_a_step_of_a_model_folder_on_a_rollout(model: Path, file: Path) -> None:
    (case,) = model_cases(str(model), str(make.rollouts_of(file)), {"addition": 8}, rounds=1)
    spec = asdict(case)
    spec["engines"] = [e for e in spec["engines"] if e["name"] != "trl"]
    result = run_case(spec)
    ours, unshared, plain = (result["engines"][e["label"]] for e in spec["engines"])
    for theirs in (unshared, plain):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert ours["cpu_seconds"] > 0 and len(ours["all_seconds"]) == 2, "the step that is weighed is timed too"
    assert [row[1] for row in table([{"case": spec, "result": result}])[1:]] == ["addition"] * 3
    with pytest.raises(ValueError, match="addition with 8"):
        rollout(make.rollouts_of(file), "addition", 9)


def test_the_head_benchmark_takes_the_sections_as_settings(file: Path) -> None:
    settings = cases.real_settings(file, heads.CPU)
    assert [str(s) for s in settings[::2]] == [
        f"random 512 real {name} {inputs.load(file).masked(name):.0%} masked float32"
        for name in ("text", "addition", "questions")
    ]
    problem = settings[3].problem(heads.CPU)
    assert problem.hidden.dtype == torch.bfloat16 and len(problem.targets) == 510, "85 documents of six"
    assert cases.describe(settings[3])["logits"] == problem.logits == "real addition"


@pytest.mark.slow
def test_the_page_says_where_or1_is_slower(file: Path, tmp_path: Path) -> None:
    given = inputs.load(file)
    some = [VARIANTS[heads.PLAIN], *heads.variants()[:1]]
    errors = heads.error_rows("before", given, ["addition"], some, sample=4)
    times = heads.time_rows("before", given, ["text"], some, tokens=16, rounds=1)
    for row in times:
        row["peak_extra_mib"] = 1.0 if row["variant"] == heads.PLAIN and row["task"] == "ce" else 4.0
        row["cpu_s"] = 0.5 if row["variant"] == heads.PLAIN and row["dtype"] == "bfloat16" else 1.0
    write_json(tmp_path / "errors.json", errors, inputs={"before": given.facts})
    write_json(tmp_path / "times.json", times, load="none")
    write_json(tmp_path / "eps.json", row_eps.rows("before", given, "addition", rounds=1, eps=(1e-3, 0.99)))
    page = " ".join(write_page(tmp_path, tmp_path / "page").read_text().split())
    assert "or1 is slower in 3 of 6: naive torch (text, bfloat16, policy: 0.50)" in page
    assert "more memory in 2: naive torch (text, float32, ce: 0.25); naive torch (text, bfloat16, ce: 0.25)." in page
    engines = {"or1": 2.0, "or1, prompts not shared": 4.0, "TRL": 3.0}
    numbers = {"peak_gib": 1.0, "loss": 0.0, "entropy": 1.0, "grad_norm": 1.0}
    result = {"engines": {label: numbers | {"cpu_seconds": seconds} for label, seconds in engines.items()}}
    write_json(tmp_path / "step.json", [{"case": {"section": "addition", "responses": 8}, "result": result}])
    page = " ".join(write_page(tmp_path, tmp_path / "page").read_text().split())
    assert 'moments. "or1, prompts not shared" is slower than TRL on addition. |' in page
    assert "holds for or1 in 6 of 6 comparisons" in page
    assert (tmp_path / "page" / "times.json").read_bytes() == (tmp_path / "times.json").read_bytes()
    assert (tmp_path / "page" / "real.svg").stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match=r"errors\.json"):
        write_page(file.parent, tmp_path / "none")


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_head_is_exact_on_a_pretrained_model(tmp_path: Path) -> None:
    named = os.environ.get("OR1_SMOLLM2")
    if named is None:
        pytest.skip("OR1_SMOLLM2 names no folder; python examples/smollm2/make.py writes one")
    path = tmp_path / "real.safetensors"
    sizes = make.Sizes(windows=1, length=32, groups=2, group_size=4, documents=8, tokens=8)
    given = make.make(named, path, sizes=sizes)
    assert given.sections["addition"].live.sum() > 8, "answers of more than a token"
    rows = heads.error_rows("before", given, ["text", "addition"], heads.variants()[:2], sample=16)
    assert {row["three_way"] for row in rows} == {"holds"}
    for row in row_eps.rows("before", given, "addition", rounds=1, eps=(1e-3, 1e-1)):
        assert row["true"] <= row["bound"] * (1 + 1e-4)
    (case,) = model_cases(named, str(make.rollouts_of(path)), {"addition": 4})
    spec = asdict(case)
    spec["engines"] = [e for e in spec["engines"] if e["label"] in ("or1", "plain transformers")]
    ours, plain = run_case(spec)["engines"].values()
    assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
