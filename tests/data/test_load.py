"""Problem files: what becomes a prompt, what is named and left out, and the order in which a run takes them."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from or1.config import Config
from or1.data import DataError, load_problems
from or1.data import rows as rows_module
from tests.helpers.problem_files import CHAT, GOOD, golds_of, load, user, write


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
