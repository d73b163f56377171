"""Problem files: what becomes a prompt, what is named and left out, and the order in which a run takes them."""

from __future__ import annotations

import json
import re
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from or1.config import Config
from or1.data import DataError, PromptSet, Sampler, SamplerState, encode, load_problems, load_prompts, prompt_lines
from or1.data import rows as rows_module

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
VOCAB = {token: i for i, token in enumerate(["<eos>", "<bos>", "<unk>", "\n"] + [chr(c) for c in range(32, 127)])}


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character."""
    core = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


def load(*paths: Path, chat_template: str | None = None, max_prompt_tokens: int = 100, **options) -> PromptSet:
    return load_prompts(paths, make_tokenizer(chat_template), max_prompt_tokens=max_prompt_tokens, **options)


def write(path: Path, *rows: object) -> Path:
    """JSONL; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def golds_of(prompts: PromptSet) -> list[tuple[str, ...]]:
    return [p.golds for p in prompts.prompts]


def decoded(tokens: np.ndarray) -> str:
    return make_tokenizer().decode(tokens)


GOOD = {"question": "1+1=", "answer": "2"}


# --- broken rows


def test_every_broken_line_is_named_and_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 1 << 20)
    path = write(
        tmp_path / "train.jsonl",
        GOOD,
        b'{"question": "1+2=", "answer": "3',
        b'{"question": "\xff\xfe", "answer": "3"}',
        {"question": "no answer"},
        b"",
        {"question": "  ", "answer": "3"},
        {"question": "q", "answer": " "},
        b'{"question": "a\0b", "answer": "3"}',
        {"question": "a\0b", "answer": "3"},
        b'{"question": "q", "answer": "3", "answer": "4"}',
        [1, 2],
        {"question": None, "answer": "3"},
        {"question": "q", "answer": []},
        {"question": "q", "answer": {"x": 1}},
        {"question": "\ud800", "answer": "3"},
        b'{"question": "q", "answer": NaN}',
        b"[" * 100_000,
        b'{"question": "' + b"q" * (1 << 20) + b'", "answer": "3"}',
        {"question": "q" * 101, "answer": "3"},
        {"question": "3+4=", "answer": 7},
    )
    prompts = load(path, max_bad_fraction=1.0)
    assert [(p.id, p.text, p.golds) for p in prompts.prompts] == [
        ("train.jsonl:1", "1+1=", ("2",)),
        ("train.jsonl:20", "3+4=", ("7",)),
    ]
    report = prompts.reports[0]
    assert (report.rows, report.kept, report.over_long, len(report.bad)) == (19, 2, 1, 16)
    assert [f"{line}: {reason}" for line, reason in report.bad] == [
        "2: not JSON: Unterminated string starting at character 32",
        "3: not UTF-8 at byte 15 of the line",
        "4: missing column 'answer'",
        "6: column 'question' is empty",
        "7: gold answer is empty",
        "8: NUL byte at byte 16 of the line",
        "9: column 'question' holds a NUL character",
        "10: key 'answer' appears twice",
        "11: is a JSON list, not an object",
        "12: column 'question' is null",
        "13: list of gold answers is empty",
        "14: gold answer is a dict, not text or a number",
        "15: column 'question' holds half a surrogate pair at character 1",
        "16: gold answer is nan",
        "17: JSON nested too deeply",
        "18: line of 1048608 bytes is over the limit of 1048576; leave out columns that are not needed, or write the "
        "file as parquet",
    ]
    assert report.summary() == f"{path}: 19 rows (question/answer), 2 kept, 1 over-long, 16 bad"


def test_too_many_broken_rows_stop_with_the_list(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", *[GOOD] * 75, *[b"{"] * 25)
    assert len(load(path, max_bad_fraction=0.25).prompts) == 75
    with pytest.raises(DataError) as caught:
        load(path, max_bad_fraction=0.24)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}: 25 of 100 rows are unusable, more than max_bad_fraction = 0.24; ")
    assert lines[1].startswith(f"  {path}:76: not JSON: ") and lines[20].startswith(f"  {path}:95: not JSON: ")
    assert lines[21:] == ["  ... and 5 more"]


def test_the_limit_holds_for_each_file_and_all_offenders_are_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", *[GOOD] * 1000)
    bad = write(tmp_path / "bad.jsonl", GOOD, b"{")
    worse = write(tmp_path / "worse.jsonl", GOOD, b"{", b"{")
    with pytest.raises(DataError) as caught:
        load(good, bad, worse, tmp_path / "absent.jsonl", max_bad_fraction=0.1)
    heads = [line for line in str(caught.value).splitlines() if not line.startswith(" ")]
    assert [head.partition(": ")[0] for head in heads] == [str(bad), str(worse), str(tmp_path / "absent.jsonl")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([b""], "has no rows"),
        ([{"question": "q" * 101, "answer": "1"}], "1 are longer than max_prompt_tokens = 100"),
        ([{"instruction": "q", "output": "1"}], "the first has instruction, output; rename"),
        ([b"[", b"{}", b"]"], "the first has none; rename"),
        ([b'[{"question": "q", "answer": "1"},', b'{"question":'], "is not a whole JSON array .* at line"),
    ],
)
def test_a_file_nothing_can_be_used_of_is_an_error(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(DataError, match=f"x.jsonl: .*{message}"):
        load(write(tmp_path / "x.jsonl", *rows), max_bad_fraction=1.0)


def test_a_byte_order_mark_and_windows_line_ends_are_no_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([json.dumps(GOOD).encode()] * 2) + b"\r\n\r\n")
    assert len(load(path, max_bad_fraction=0.0).prompts) == 2


def test_a_line_over_the_limit_is_passed_over_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "x.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n" + (b"x" * (1 << 20) + b" ") * 40 + b"\n" + good + b"\n" + b"y" * (3 << 20))
    tracemalloc.start()
    found = list(rows_module.read_rows(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(line, isinstance(row, dict)) for line, row in found] == [(1, True), (2, False), (3, True), (4, False)]
    assert f"line of {40 * ((1 << 20) + 1) + 1} bytes" in str(found[1][1]) and f"{3 << 20} bytes" in str(found[3][1])
    assert peak < 8 << 20


def test_a_key_that_comes_twice_is_found_in_linear_time(tmp_path: Path) -> None:
    keys = ",".join(f'"k{i}": 1' for i in range(100_000))
    long = "k" * 999
    path = write(tmp_path / "x.jsonl", f'{{{keys},"k99999": 2}}'.encode(), f'{{"{long}": 1, "{long}": 2}}'.encode())
    began = time.process_time()
    found = [str(row) for _, row in rows_module.read_rows(str(path))]
    # Counting every key anew takes minutes.
    assert time.process_time() - began < 10
    assert found == ["key 'k99999' appears twice", f"key {'k' * 60!r} appears twice"]


# --- schemas


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("row", "schema", "golds"),
    [
        ({"question": "q", "answer": "thus\n#### 1,234"}, "question/answer", ("1234",)),
        ({"question": "q", "answer": "####  -5"}, "question/answer", ("-5",)),
        ({"question": "q", "answer": "(1,234)"}, "question/answer", ("(1,234)",)),
        ({"problem": "q", "answer": r"\frac12", "solution": r"\boxed{9}"}, "problem/answer", (r"\frac12",)),
        ({"problem": "q", "answer": ["1/2", 0.5]}, "problem/answer", ("1/2", "0.5")),
        ({"prompt": "q", "answer": "1", "solution": r"\boxed{9}"}, "prompt/answer", ("1",)),
        ({"prompt": user("q"), "ground_truth": "1"}, "prompt/ground_truth", ("1",)),
        (
            {"prompt": user("q"), "solution": r"so \boxed{1} or \boxed{\frac{1}{2}}."},
            "prompt/solution",
            (r"\frac{1}{2}",),
        ),
        ({"prompt": "q", "solution": "$x$"}, "prompt/solution", ("$x$",)),
        ({"prompt": user("q"), "reward_model": {"ground_truth": "34"}}, "prompt/reward_model", ("34",)),
        (
            {"prompt": user("q"), "reward_model": {"ground_truth": '["\\\\frac12", "0.5"]'}},
            "prompt/reward_model",
            (r"\frac12", "0.5"),
        ),
        ({"prompt": user("q"), "reward_model": {"ground_truth": "[1, 2]"}}, "prompt/reward_model", ("[1, 2]",)),
        ({"problem": "q", "answer": '["1", "2"]'}, "problem/answer", ("1", "2")),
        ({"question": "q", "answer": '["1", "2"]'}, "question/answer", ("1", "2")),
        ({"prompt": "q", "answer": '["1", "2"]'}, "prompt/answer", ("1", "2")),
        ({"question": "q", "answer": 1.5e-5}, "question/answer", ("0.000015",)),
        ({"prompt": user("q"), "reward_model": {"ground_truth": "[1, 2)"}}, "prompt/reward_model", ("[1, 2)",)),
    ],
)
def test_schemas_are_detected_and_reported(tmp_path: Path, row: dict, schema: str, golds: tuple[str, ...]) -> None:
    prompts = load(write(tmp_path / "x.jsonl", row))
    assert prompts.reports[0].schema == schema
    assert [(p.text, p.golds) for p in prompts.prompts] == [("q", golds)]


def test_each_file_has_its_own_schema_and_source(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one = write(tmp_path / "a.jsonl", GOOD)
    two = write(tmp_path / "b" / "a.jsonl", {"problem": "q", "answer": "1", "data_source": "train-math-x"})
    prompts = load(one, two)
    assert [r.schema for r in prompts.reports] == ["question/answer", "problem/answer"]
    assert [(p.id, p.source) for p in prompts.prompts] == [(f"{one}:1", str(one)), (f"{two}:1", "train-math-x")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": user("q"), "reward_model": "34"}, "column 'reward_model' is a str"),
        ({"prompt": user("q"), "reward_model": {"style": "rule"}}, "missing column 'ground_truth'"),
        ({"prompt": 5, "reward_model": {"ground_truth": "1"}}, "neither text nor a list of messages"),
        ({"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "1"}}, "lacks a role or content"),
        ({"prompt": [], "reward_model": {"ground_truth": "1"}}, "no user message"),
        ({"prompt": user(" "), "reward_model": {"ground_truth": "1"}}, "column 'prompt' is empty"),
        ({"prompt": user("q") * 2, "reward_model": {"ground_truth": "1"}}, "2 messages, but .* no chat template"),
    ],
)
def test_broken_messages_are_bad_rows(tmp_path: Path, row: dict, reason: str) -> None:
    with pytest.raises(DataError, match=f"x.jsonl:1: .*{reason}"):
        load(write(tmp_path / "x.jsonl", row))


# --- tokens


def test_without_a_chat_template_a_question_is_encoded_as_it_is(tmp_path: Path) -> None:
    prompt = load(write(tmp_path / "x.jsonl", GOOD), prompt_suffix=" Box it.").prompts[0]
    assert prompt.text == "1+1= Box it." and decoded(prompt.token_ids) == "1+1= Box it."
    assert prompt.token_ids.dtype == np.int32 and prompt.token_ids.ndim == 1


def test_with_a_chat_template_a_question_is_one_user_message(tmp_path: Path) -> None:
    prompt = load(write(tmp_path / "x.jsonl", GOOD), chat_template=CHAT, prompt_suffix="!").prompts[0]
    assert prompt.text == "1+1=!" and decoded(prompt.token_ids) == "[user]1+1=![assistant]"
    assert prompt.token_ids.dtype == np.int32 and prompt.token_ids.ndim == 1


def test_the_suffix_follows_the_last_user_message(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, *user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    path = write(tmp_path / "x.jsonl", {"prompt": messages, "answer": "1"})
    prompt = load(path, chat_template=CHAT, prompt_suffix="!").prompts[0]
    assert decoded(prompt.token_ids) == "[system][user]a[assistant]b[user]c![assistant]"


def test_what_the_chat_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    tool = {"prompt": [*user("q"), {"role": "tool", "content": "x"}], "answer": "1"}
    path = write(tmp_path / "x.jsonl", {"prompt": user("q"), "answer": "1"}, tool)
    report = load(path, chat_template=CHAT, max_bad_fraction=0.5).reports[0]
    assert report.bad == ((2, "the chat template refuses it: no tools here"),)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "the chat template of 'the tokenizer' has not encoded one prompt after 0 s; it may loop"),
        ("{% for m in messages %}", "the chat template of 'the tokenizer' is not Jinja: .* in line 1; mend"),
    ],
)
def test_a_chat_template_that_loops_or_is_none_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr(encode, "TEMPLATE_LIMIT_S", 0.3)
    before = signal.getsignal(signal.SIGALRM)
    one, two = write(tmp_path / "x.jsonl", *[GOOD] * 99), write(tmp_path / "y.jsonl", GOOD)
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        load(one, two, chat_template=template, max_bad_fraction=1.0)
    # Once, not for every row or file.
    assert time.monotonic() - began < 20 and len(str(caught.value)) < 500
    assert signal.getsignal(signal.SIGALRM) == before


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[0]['content'].nothing() }}", "'str object' has no attribute 'nothing'"),
        ("{{ 'x' * 2 ** 62 }}", "(MemoryError|OverflowError): .*"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: .*"),
    ],
)
def test_however_a_chat_template_fails_it_costs_the_row_only(tmp_path: Path, template: str, reason: str) -> None:
    tool = {"prompt": [*user("q"), {"role": "tool", "content": "x"}], "answer": "1"}
    path = write(tmp_path / "x.jsonl", {"prompt": user("q"), "answer": "1"}, tool)
    broken = "{% if messages|length > 1 %}" + template + "{% endif %}" + CHAT
    report = load(path, chat_template=broken, max_bad_fraction=0.5).reports[0]
    assert [line for line, _ in report.bad] == [2]
    assert re.fullmatch(f"the chat template refuses it: {reason}", report.bad[0].reason)


def test_json_text_of_messages_is_read_as_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, *user("1+1=")]
    path = write(tmp_path / "x.jsonl", {"prompt": json.dumps(messages), "answer": "2"})
    prompt = load(path, chat_template=CHAT, prompt_suffix="!").prompts[0]
    assert decoded(prompt.token_ids) == "[system]s[user]1+1=![assistant]" and prompt.text == "s\n\n1+1=!"
    assert prompt.messages[-1] == {"role": "user", "content": "1+1=!"}


@pytest.mark.parametrize("text", ['[{"a": 1}]', '[{"role": "user"}]', '[{"role": 1', "[]", "[1, 2]", "{}"])
def test_other_json_text_is_a_question(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path / "x.jsonl", {"prompt": text, "answer": "2"})).prompts[0].text == text


def test_a_prompt_is_shown_as_the_model_sees_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"question": "1+1=\n?", "answer": "2"}, GOOD)
    tokenizer = make_tokenizer("<bos>" + CHAT)
    found = load_prompts([path], tokenizer, max_prompt_tokens=100).prompts
    assert prompt_lines(found, tokenizer) == [
        f"first prompt as the model sees it (x.jsonl:1, {len(found[0].token_ids)} tokens):",
        "  | <bos>[user]1+1=",
        "  | ?[assistant]",
    ]
    plain = make_tokenizer()
    lines = prompt_lines(load_prompts([path], plain, max_prompt_tokens=100).prompts, plain)
    assert lines[1:3] == ["  | 1+1=", "  | ?"] and lines[3].startswith("no chat template: plain text")
    long = write(tmp_path / "y.jsonl", {"question": "a" + "q" * 9998 + "z", "answer": "2"})
    shown = prompt_lines(load_prompts([long], plain, max_prompt_tokens=99999).prompts, plain)[1]
    assert shown.startswith("  | aqq") and shown.endswith("qz") and "(8,000 more characters)" in shown
    assert prompt_lines([], plain) == []


def test_bos_is_kept_and_eos_is_not_added(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", VOCAB["<bos>"]), ("<eos>", VOCAB["<eos>"])]
    )
    assert tokenizer("1")["input_ids"][-1] == tokenizer.eos_token_id
    prompt = load_prompts([write(tmp_path / "x.jsonl", GOOD)], tokenizer, max_prompt_tokens=9).prompts[0]
    assert prompt.token_ids.tolist() == [VOCAB[t] for t in ("<bos>", "1", "+", "1", "=")]


def test_over_long_prompts_are_counted_and_are_not_bad(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"question": "q" * n, "answer": "1"} for n in (9, 10, 11)))
    prompts = load(path, max_prompt_tokens=10, max_bad_fraction=0.0)
    assert [len(p.token_ids) for p in prompts.prompts] == [9, 10]
    assert (prompts.reports[0].over_long, prompts.reports[0].bad) == (1, ())


# --- parquet


def test_parquet_rows_are_read_and_numbered_from_one(tmp_path: Path) -> None:
    rows = [{"prompt": user(f"{i}?"), "reward_model": {"ground_truth": str(i)}, "data_source": "s"} for i in range(5)]
    rows[2]["reward_model"] = None
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows).append_column("image", pa.array([b"\xff"] * 5)), path, row_group_size=2)
    prompts = load(path, max_bad_fraction=0.2)
    assert [(p.id, p.source, p.golds) for p in prompts.prompts] == [
        (f"x.parquet:{i + 1}", "s", (str(i),)) for i in (0, 1, 3, 4)
    ]
    assert prompts.reports[0].bad == ((3, "column 'reward_model' is null"),)


def test_parquet_rows_are_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[int] = []
    one_row = rows_module._batch_row
    monkeypatch.setattr(rows_module, "_batch_row", lambda batch: alone.append(batch.num_rows) or one_row(batch))
    questions = [f"{i}?".encode() for i in range(3000)]
    questions[1500] = b"a\xff"
    path = tmp_path / "x.parquet"
    table = pa.table({"question": pa.array(questions, pa.binary()).view(pa.string()), "answer": ["1"] * 3000})
    pq.write_table(table, path)
    found = list(rows_module.read_rows(str(path)))
    assert [number for number, _ in found] == list(range(1, 3001))
    assert isinstance(found[1500][1], rows_module.RowError) and found[1501][1] == {"question": "1501?", "answer": "1"}
    # Only the batch with the broken row is read row by row.
    assert alone == [1] * 1024


def test_a_parquet_value_that_python_cannot_hold_costs_its_row_only(tmp_path: Path) -> None:
    when = pa.array([0, 1 << 50, 0], pa.timestamp("ms"))
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"question": ["1?", "2?", "3?"], "answer": ["1", "2", "3"], "when": when}), path)
    prompts = load(path, max_bad_fraction=0.4)
    assert golds_of(prompts) == [("1",), ("3",)]
    assert "a value cannot be read: " in prompts.reports[0].bad[0].reason


def test_bad_utf8_in_parquet_costs_its_row_only(tmp_path: Path) -> None:
    questions = pa.array([b"1?", b"a\xff", b"3?"], pa.binary()).view(pa.string())
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"question": questions, "answer": ["1", "2", "3"]}), path)
    prompts = load(path, max_bad_fraction=0.4)
    assert golds_of(prompts) == [("1",), ("3",)]
    assert prompts.reports[0].bad == ((2, "text is not UTF-8 at byte 2"),)


@pytest.mark.parametrize("damage", ["footer", "page", "empty", "text"])
def test_a_damaged_parquet_file_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"question": [f"{i}?" for i in range(100)], "answer": ["1"] * 100})
    pq.write_table(table, path, use_dictionary=False, compression="NONE", write_page_checksum=True)
    whole = path.read_bytes()
    assert b"55?" in whole and len(load(path).prompts) == 100
    broken = {"footer": whole[:-9], "page": whole.replace(b"55?", b"56?"), "empty": b"", "text": b"hello"}
    path.write_bytes(broken[damage])
    with pytest.raises(DataError, match=r"x.parquet: is not a whole parquet file \(.+\); write it anew"):
        load(path)


# --- order


def test_the_order_is_pinned() -> None:
    # A run resumes by this order; if it must change, old checkpoints must not be accepted.
    order = [5, 0, 1, 4, 2, 6, 3, 7]
    assert Sampler(8, seed=1).take(SamplerState(), 8)[0].tolist() == order
    assert Sampler(8, seed=2).take(SamplerState(), 8)[0].tolist() != order
    assert Sampler(8, seed=1).take(SamplerState(epoch=1), 8)[0].tolist() != order


@pytest.mark.parametrize("counts", [[1] * 30, [7, 7, 7, 9], [30], [0, 10, 10, 10]])
def test_the_order_does_not_depend_on_how_it_is_taken(counts: list[int]) -> None:
    state, taken = SamplerState(), []
    for count in counts:
        # A new Sampler each time: nothing but the state carries over.
        indices, state = Sampler(10, seed=3).take(state, count)
        assert len(indices) == count and 0 <= state.cursor < 10
        taken += indices.tolist()
    assert state == SamplerState(epoch=3, cursor=0)
    assert taken == Sampler(10, seed=3).take(SamplerState(), 30)[0].tolist()
    epochs = np.reshape(taken, (3, 10))
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


@pytest.mark.parametrize("state", [SamplerState(0, 10), SamplerState(0, -1), SamplerState(-1, 0)])
def test_a_state_of_other_data_is_refused(state: SamplerState) -> None:
    with pytest.raises(DataError, match="does not fit 10 prompts; resume with the data files the run started with"):
        Sampler(10, seed=1).take(state, 1)


def test_a_sampler_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="at least 1 prompt"):
        Sampler(0, seed=1)


# --- real data


@pytest.mark.parametrize(
    ("name", "schema", "rows", "first"),
    [
        ("gsm8k_train.jsonl", "question/answer", 7473, ("72",)),
        ("gsm8k_test.jsonl", "question/answer", 1319, ("18",)),
        ("aime24.parquet", "prompt/reward_model", 30, ("204",)),
        ("aime25.parquet", "prompt/reward_model", 30, ("70",)),
    ],
)
def test_real_files_have_no_bad_row(root: Path, name: str, schema: str, rows: int, first: tuple[str, ...]) -> None:
    path = root.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"no {name}: this test reads it from shared/data beside the repository")
    prompts = load(path, chat_template=CHAT, max_prompt_tokens=10_000, max_bad_fraction=0.0)
    report = prompts.reports[0]
    assert (report.schema, report.rows, report.kept) == (schema, rows, rows)
    assert golds_of(prompts)[0] == first
    assert all(gold.isascii() and len(gold) < 20 for golds in golds_of(prompts) for gold in golds)


@pytest.mark.parametrize("name", ["prompt", "question", "problem"])
def test_a_function_of_ones_own_needs_no_answers(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "x.jsonl", {name: "hi", "style": "brief"}, {name: "ho"})
    with pytest.raises(DataError, match=rf"the first has {name}, style; rename .* or write a reward function of your"):
        load(path)
    stage = {"steps": 1, "max_response_tokens": 4, "prompts_per_step": 1, "group_size": 2}
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path),
            "model": {"path": "m"},
            "data": {"train": [str(path)]},
            "stage": [stage],
            "eval": {"sets": [{"name": "e", "path": str(path)}]},
            "reward": {"kind": "m:f"},
        }
    )
    data = load_problems(config, None)
    assert [(p.text, p.golds, p.row.get("style")) for p in data.prompts] == [("hi", (), "brief"), ("ho", (), None)]
    assert len(data.eval_prompts["e"]) == 2 and f"({name}, no answers), 2 kept" in data.reports[0].summary()
    with pytest.raises(DataError, match=r"the first has text; rename them to one of: .*, prompt, question, problem$"):
        load(write(tmp_path / "y.jsonl", {"text": "hi"}), answers=False)
