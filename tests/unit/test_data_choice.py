"""Which prompts a run takes: mixtures, difficulty, decontamination, solved prompts, tests of programs, JSON arrays."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from or1.commands import filter as filter_run
from or1.config import Config
from or1.core.types import Group, Prompt, Response, Score, Status
from or1.data import (
    DataError,
    DifficultyFilter,
    Pool,
    Sampler,
    SamplerState,
    SolvedPrompts,
    load_problems,
    load_prompts,
    times_solved,
)
from or1.data.contamination import EvalIndex, Overlap, decontamination_lines

NO_IDS = np.empty(0, np.int32)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(text: str, name: str = "p") -> Prompt:
    return Prompt(name, "s", text, NO_IDS, ("1",))


def load(path: Path, **options):
    return load_prompts([path], None, max_prompt_tokens=100, **options)


# --- mixtures


POOLS = (Pool(0, 5, 1.0), Pool(5, 20, 1.0), Pool(25, 75, 3.0))


def test_a_mixture_has_its_shares_in_every_epoch_and_no_prompt_comes_twice_before_all_came_once() -> None:
    sampler = Sampler(100, seed=4, pools=POOLS)
    order = sampler.take(SamplerState(), 500)[0].reshape(5, 100)
    for epoch in order:
        shares = [int(((epoch >= p.start) & (epoch < p.start + p.size)).sum()) for p in POOLS]
        assert shares == [20, 20, 60]
    small, middle = order[0][order[0] < 5], order[0][(order[0] >= 5) & (order[0] < 25)]
    assert set(Counter(small.tolist()).values()) == {4} and len(set(middle.tolist())) == 20
    # 60 of the 75 in the first epoch; the 15 others open the second, so 300 draws are four rounds.
    large = order[order >= 25]
    assert len(set(large[:60].tolist())) == 60 and set(Counter(large.tolist()).values()) == {4}


@pytest.mark.parametrize("counts", [[1] * 40, [13, 27], [40]])
def test_a_mixture_does_not_depend_on_how_it_is_taken(counts: list[int]) -> None:
    pools = (Pool(0, 3, 1.0), Pool(3, 8, 2.0))
    state, taken = SamplerState(), []
    for count in counts:
        indices, state = Sampler(11, seed=3, pools=pools).take(state, count)
        taken += indices.tolist()
    assert taken == Sampler(11, seed=3, pools=pools).take(SamplerState(), 40)[0].tolist()
    assert taken != Sampler(11, seed=4, pools=pools).take(SamplerState(), 40)[0].tolist()


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"weight 0\.001 of 1\.001, which is less than one of the 10 prompts"):
        Sampler(10, seed=1, pools=(Pool(0, 5, 1.0), Pool(5, 5, 0.001)))


def test_skipping_keeps_the_order_of_the_others_and_the_place() -> None:
    sampler = Sampler(10, seed=3)
    plain = sampler.take(SamplerState(), 30)[0]
    skip = np.isin(np.arange(10), [2, 7, 9])
    head, state = sampler.take(SamplerState(), 4)
    tail, _ = sampler.take(state, 17, skip)
    expected = [i for i in plain[4:].tolist() if i not in (2, 7, 9)]
    assert head.tolist() == plain[:4].tolist() and tail.tolist() == expected[:17]
    # One at a time, each with a sampler of its own: the same.
    one_by_one = []
    for _ in range(17):
        index, state = Sampler(10, seed=3).take(state, 1, skip)
        one_by_one += index.tolist()
    assert one_by_one == tail.tolist()
    with pytest.raises(DataError, match=r"all 10 prompts are to be skipped; .*drop_solved"):
        sampler.take(SamplerState(), 1, np.ones(10, bool))


# --- solved prompts


def group(name: str, *rewards: float) -> Group:
    response = Response(NO_IDS, np.empty(0, np.float32), "stop", 0, "")
    scores = tuple(Score(r, Status.OK if r else Status.WRONG) for r in rewards)
    return Group(ask("q", name), (response,) * len(rewards), scores)


def test_a_stage_drops_what_the_one_before_solved_every_time_it_came() -> None:
    solved = SolvedPrompts()
    assert solved.enter(0) == 0 and solved.mask([ask("q", "a")]) is None
    solved.note([group("a", 1, 1), group("b", 1, 0), group("c", 1, 1), group("d", 0.5, 0.5)])
    solved.note([group("c", 1, 0), group("a", 1, 1)])
    solved = SolvedPrompts.from_state(json.loads(json.dumps(solved.state())))
    assert solved.enter(0) == 0 and solved.enter(1) == 1 and solved.enter(1) == 0
    assert solved.mask([ask("q", name) for name in "abcd"]).tolist() == [True, False, False, False]
    solved.note([group("b", 1, 1)])
    assert solved.enter(2) == 1 and solved.dropped == {"a", "b"}


def test_a_prompt_that_is_right_by_now_is_dropped_where_the_last_visit_counts() -> None:
    for visits, dropped in (("all", {"b"}), ("last", {"a", "b"})):
        solved = SolvedPrompts()
        solved.note([group("a", 1, 0), group("b", 1, 1), group("c", 1, 1)], visits)
        solved.note([group("a", 1, 1), group("c", 0, 1)], visits)
        solved.enter(1)
        assert solved.dropped == dropped


# --- difficulty


def rated(name: str, **counts: int | str | None) -> dict:
    return {
        "prompt": [{"role": "user", "content": name}],
        "reward_model": {"ground_truth": "1"},
        "extra_info": {"index": 0, "model_difficulty": counts},
    }


def test_difficulty_of_a_named_model_is_kept_counted_and_its_absence_explained(tmp_path: Path) -> None:
    rows = [rated(f"q{n}", small=n, large=16) for n in (0, 1, 15, 16)]
    path = write(tmp_path / "x.jsonl", *rows, rated("q", large=3))
    found = load(path, difficulty=DifficultyFilter(1, 15, model="small"))
    assert [p.text for p in found.prompts] == ["q1", "q15"]
    report = found.reports[0]
    assert report.filtered == {"too hard": 1, "too easy": 1, "without a difficulty": 1}
    assert "2 kept, 0 over-long, 1 too hard, 1 too easy, 1 without a difficulty, 0 bad" in report.summary()
    with pytest.raises(DataError, match=r"difficulty_model = 'medium'; they have: large, small"):
        load(path, difficulty=DifficultyFilter(1, 15, model="medium"))
    bad = write(tmp_path / "y.jsonl", rated("q", small="many"), rated("q", small=3))
    report = load(bad, difficulty=DifficultyFilter(1, 15, model="small"), max_bad_fraction=1).reports[0]
    assert "'many', not a number" in report.bad[0].reason


def config(tmp_path: Path, **data: object) -> Config:
    return Config(run_dir=str(tmp_path / "run"), model={"path": "m"}, data=data, eval={"sets": data.pop("sets", ())})


def test_difficulty_of_a_file_goes_by_the_whole_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"question": f"q{n}", "answer": "1"} for n in range(5)))
    rates = tmp_path / "difficulty.parquet"
    table = {"prompt": [f"q{n}!" for n in range(4)], "samples": [8] * 4, "passes": [0, 1, 7, 8]}
    pq.write_table(pa.table(table), rates)
    settings = {"train": str(path), "prompt_suffix": "!", "difficulty_file": str(rates)}
    found = load_problems(config(tmp_path, **settings, keep_difficulty=(1, 7)), None)
    assert [p.text for p in found.prompts] == ["q1!", "q2!"] and found.notes == []
    warned = load_problems(config(tmp_path, **settings, keep_difficulty=(1, 15)), None)
    assert len(warned.prompts) == 3 and "counts out of 8, so keep_difficulty up to 15" in warned.notes[0]
    rates.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not a file of `or1 filter`"):
        load_problems(config(tmp_path, **settings, keep_difficulty=(1, 7)), None)


def test_a_model_with_nothing_but_null_counts_is_not_listed_as_one_that_has_some(tmp_path: Path) -> None:
    rows = [rated(f"q{n}", **{"32B": None, "7B": n}) for n in range(3)]
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(DataError, match=r"No row has a count for data.difficulty_model = '32B'; they have: 7B$"):
        load(path, difficulty=DifficultyFilter(1, 15, model="32B"))
    bare = write(tmp_path / "y.jsonl", rated("q", **{"32B": None}))
    with pytest.raises(DataError, match=r"No row has a count for .* = '32B', nor for any other model$"):
        load(bare, difficulty=DifficultyFilter(1, 15, model="32B"))
    # Some of the rows have one, so nothing may say that none has.
    mixed = write(tmp_path / "z.jsonl", rated("a", **{"32B": 16}), rated("b", **{"32B": None}))
    with pytest.raises(DataError, match=r"1 are too easy, 1 are without a difficulty, 0 are bad; [^.]*$"):
        load(mixed, difficulty=DifficultyFilter(1, 15, model="32B"))
    # What another file has is no count of this one.
    with pytest.raises(DataError) as caught:
        load_prompts([mixed, path], None, max_prompt_tokens=9, difficulty=DifficultyFilter(1, 16, model="32B"))
    assert "= '32B'; they have: 7B" in str(caught.value)


@pytest.mark.parametrize(
    ("passes", "solved"),
    [([5, 6, 5], 5), ([5, 6, 6], 6), ([8, 8, 8], 8), ([8, 8, 7], 7), ([0, 0, 1], 1), ([0, 0, 0], 0), ([3], 3)],
)
def test_prompts_with_equal_text_have_one_count(passes: list[int], solved: int) -> None:
    rows = [("q", each, 8) for each in passes]
    assert times_solved([*rows, ("other", 2, 8)]) == {"q": solved, "other": 2}
    assert times_solved(reversed(rows)) == {"q": solved}


@pytest.mark.parametrize("passes", [[5, 6, 5], [6, 5, 5], [5, 5, 6], [6, 6, 5], [8, 8, 7], [0, 1, 0]])
def test_filter_and_train_keep_the_same_of_prompts_with_equal_text(
    tmp_path: Path, passes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    questions = ["1+2", "1+2", "1+2", "a", "b", "c"]
    path = write(tmp_path / "train.jsonl", *({"question": q, "answer": "3"} for q in questions))
    rates = tmp_path / "difficulty.parquet"
    counts = {
        "prompt": questions,
        "samples": [8] * 6,
        "passes": [*passes, 0, 5, 8],
        "truncated": [0] * 6,
        "failed": [0] * 6,
    }
    pq.write_table(pa.table(counts), rates)

    class Counted:
        def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
            yield pq.read_table(rates).select(list(columns))

    for keep in ((1, 5), (1, 7), (0, 5), (6, 8)):
        base = config(tmp_path, train=str(path), difficulty_file=str(rates), keep_difficulty=keep)
        settings = base.model_copy(update={"filter": base.filter.model_copy(update={"samples": 8})})
        filter_run._summarise(settings, Counted(), rates)
        kept = [p.text for p in load_problems(settings, None).prompts]
        assert f"keeps {len(kept)} of 6 prompts" in capsys.readouterr().out
        assert kept.count("1+2") in (0, 3)


def test_prompts_with_equal_text_are_told(tmp_path: Path) -> None:
    rows = [("1+2", "3"), ("a", "1"), ("1+2", "3"), ("1+2", "4"), ("b", "1")]
    path = write(tmp_path / "train.jsonl", *({"question": q, "answer": a} for q, a in rows))
    assert load_problems(config(tmp_path, train=str(path)), None).notes == [
        "duplicates: 2 of 5 training prompts have the text of an earlier one (train.jsonl:3 that of train.jsonl:1); "
        "kept, so they are trained on more often",
        "  1 of them with another answer, so one of the two is wrong: train.jsonl:4 has '4', train.jsonl:1 has '3'",
    ]
    one = write(tmp_path / "one.jsonl", {"question": "a", "answer": "1"}, {"question": "b", "answer": "1"})
    # A file that is named twice is meant to count twice.
    twice = load_problems(config(tmp_path, train=[str(one), str(one)]), None)
    assert len(twice.prompts) == 4 and twice.notes == []


# --- decontamination


SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."
HELD_OUT = [
    "Every morning Aya goes for a nine kilometer long walk and stops at a coffee shop afterwards." + SUFFIX,
    "Let ABC be a triangle inscribed in a circle whose centre lies on the side AB of length ten." + SUFFIX,
    "Find the number of ways to place eight rooks on a board so that no two attack each other." + SUFFIX,
    "What is 12+7?",
    "Find the sum of all primes below 20",
]


@pytest.fixture(scope="module")
def index() -> EvalIndex:
    return EvalIndex({"aime": [ask(text, f"aime:{i}") for i, text in enumerate(HELD_OUT)]})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("In the story, every MORNING Aya goes for a nine-kilometer long walk; and stops at a coffee house.", "aime:0"),
        ("Every morning Aya goes for a nine kilometer long run.", None),
        ("A quite different problem that ends alike: find the length of AB." + SUFFIX, None),
        ("What is 12+7?", "aime:3"),
        ("what is 12 + 7 ?", "aime:3"),
        ("What is 12-7?", None),
        ("He asked: What is 12+7?", None),
        ("Now: find the sum of all primes below 20, please.", "aime:4"),
        ("Find the sum of all primes below 200", None),
    ],
)
def test_a_repeated_problem_is_found_and_a_shared_instruction_is_not(
    index: EvalIndex, text: str, found: str | None
) -> None:
    assert [overlap.eval_id for overlap in index.find([ask("other"), ask(text)])] == ([found] if found else [])


def test_a_turn_of_phrase_of_many_training_prompts_is_no_repeat(index: EvalIndex) -> None:
    words = HELD_OUT[0].removesuffix(SUFFIX)
    assert len(index.find([ask(f"{words} {i % 10}") for i in range(30)])) == 30
    assert index.find([ask(f"{words} {i}") for i in range(11)]) == []


@pytest.mark.parametrize("mode", ["off", "report", "drop"])
def test_contamination_is_listed_and_dropped_as_asked(tmp_path: Path, mode: str) -> None:
    train = write(tmp_path / "train.jsonl", *({"question": q, "answer": "1"} for q in ("new", *HELD_OUT[:2], "other")))
    held = write(tmp_path / "held.jsonl", *({"question": q, "answer": "1"} for q in HELD_OUT))
    sets = [{"name": "aime", "path": str(held), "limit": 1}]
    found = load_problems(config(tmp_path, train=str(train), decontaminate=mode, sets=sets), None)
    assert [p.id for p in found.prompts] == [f"train.jsonl:{n}" for n in ((1, 4) if mode == "drop" else (1, 2, 3, 4))]
    assert len(found.eval_prompts["aime"]) == 1
    if mode == "off":
        assert found.notes == []
    else:
        assert "2 of 4 training prompts repeat an evaluation problem (2 in aime)" in found.notes[0]
        assert "train.jsonl:2 ~ aime held.jsonl:1: every morning aya" in found.notes[1]


def test_three_repeats_are_listed_and_the_others_counted() -> None:
    overlaps = [Overlap(f"train.jsonl:{n}", "aime", f"held.jsonl:{n}", "w") for n in range(1, 29)]
    lines = decontamination_lines(overlaps, 100, dropped=False)
    assert [line.split(" ~ ")[0] for line in lines[1:4]] == [f"  train.jsonl:{n}" for n in (1, 2, 3)]
    assert "28 of 100 training prompts" in lines[0] and lines[4:] == ["  and 25 more"]
    assert len(decontamination_lines(overlaps[:3], 100, dropped=True)) == 4


def test_a_mixture_of_files_becomes_pools_without_what_was_left_out(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", *({"question": q, "answer": "1"} for q in ("a", HELD_OUT[0], "b")))
    two = write(tmp_path / "two.jsonl", *({"question": q, "answer": "1"} for q in "cdef"))
    held = write(tmp_path / "held.jsonl", *({"question": q, "answer": "1"} for q in HELD_OUT))
    mix = [{"path": str(one), "weight": 2}, {"path": str(two), "weight": 1}]
    settings = config(tmp_path, mix=mix, decontaminate="drop", decontaminate_against=str(held))
    found = load_problems(settings, None)
    assert [p.text for p in found.prompts] == list("abcdef")
    assert found.pools == (Pool(0, 2, 2.0), Pool(2, 4, 1.0))


# --- files


CASES = [{"input": "1\n", "output": "2\n"}]


@pytest.mark.parametrize(
    ("row", "schema", "kind"),
    [
        (
            {"problem": "p", "tests": {"functional": "def check(c):\n    assert c(1) == 2\n\ncheck(f)"}},
            "problem/tests",
            "asserts",
        ),
        (
            {"question": "p", "input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})},
            "question/input_output",
            "stdin",
        ),
        (
            {"prompt": "def f():", "test": "def check(c):\n    assert c() == 1", "entry_point": "f"},
            "prompt/test",
            "asserts",
        ),
        ({"text": "p", "test_list": ["assert f() == 1"]}, "text/test_list", "asserts"),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "reward_model": {"ground_truth": json.dumps({"inputs": ["1"], "outputs": ["2"]})},
            },
            "prompt/reward_model",
            "stdin",
        ),
        ({"prompt": "p", "reward_model": {"ground_truth": CASES}}, "prompt/reward_model", "stdin"),
        ({"prompt": "p", "reward_model": {"ground_truth": json.dumps(CASES)}}, "prompt/reward_model", "stdin"),
        ({"prompt": "p", "ground_truth": json.dumps(CASES)}, "prompt/ground_truth", "stdin"),
        ({"problem": "p", "tests": CASES}, "problem/tests", "stdin"),
        ({"problem": "p", "tests": json.dumps(CASES)}, "problem/tests", "stdin"),
        ({"problem": "p", "tests": json.dumps({"inputs": ["1"], "outputs": ["2"]})}, "problem/tests", "stdin"),
        ({"prompt": "p", "tests": json.dumps(CASES)}, "prompt/tests", "stdin"),
        ({"question": "p", "tests": CASES}, "question/tests", "stdin"),
    ],
)
def test_rows_with_tests_become_programming_problems(tmp_path: Path, row: dict, schema: str, kind: str) -> None:
    found = load(write(tmp_path / "x.jsonl", row))
    assert (found.reports[0].schema, found.prompts[0].tests.kind, found.prompts[0].golds) == (schema, kind, ())


def test_a_column_of_tests_that_holds_none_is_a_bad_row_with_its_content(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "x.jsonl", {"problem": "p", "tests": "see above"}))
    assert "x.jsonl:1: tests are 'see above', neither an object nor a list of objects" in str(caught.value)


def test_live_code_bench_rows_carry_format_and_packed_tests(tmp_path: Path) -> None:
    hidden = json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}]).encode()
    packed = base64.b64encode(zlib.compress(b"\x80\x04X" + len(hidden).to_bytes(4, "little") + hidden + b"\x94."))
    row = {
        "question_content": "Double it.",
        "question_id": "1",
        "starter_code": "",
        "metadata": "{}",
        "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
        "private_test_cases": packed.decode(),
    }
    prompt = load(write(tmp_path / "lcb.jsonl", row)).prompts[0]
    assert prompt.tests.inputs == ("1\n", "2\n") and prompt.tests.outputs == ("2\n", "4\n")
    assert "Double it." in prompt.text and "stdin" in prompt.text and "```python" in prompt.text
    assert "private_test_cases" not in prompt.row and prompt.row["question_id"] == "1"
    with_starter = load(write(tmp_path / "b.jsonl", row | {"starter_code": "class Solution:"})).prompts[0]
    assert "class Solution:" in with_starter.text and "stdin" not in with_starter.text


def test_a_broken_element_of_a_json_array_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(
        b'\xef\xbb\xbf [{"problem": "a", "answer": "1"},\n {"problem": "\xff", "answer": "1"}, 5,\n'
        b' {"problem": "b", "problem": "c", "answer": "1"}, {"problem": "", "answer": "1"},'
        b' {"problem": "d", "answer": 2}]'
    )
    found = load(path, max_bad_fraction=1)
    assert [(p.id, p.golds) for p in found.prompts] == [("x.json:1", ("1",)), ("x.json:6", ("2",))]
    assert [f"{line}: {reason}" for line, reason in found.reports[0].bad] == [
        "2: column 'problem' holds a byte that is not UTF-8 at character 1",
        "3: is a JSON int, not an object",
        "4: key 'problem' appears twice",
        "5: column 'problem' is empty",
    ]


@pytest.mark.parametrize(
    ("name", "rows", "kept", "tested"),
    [("leetcode_train.json", 1889, 1889, True), ("math_train.json", 7474, 7470, False)],
)
def test_real_json_arrays(root: Path, name: str, rows: int, kept: int, tested: bool) -> None:
    path = root.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"no {name}: this test reads it from shared/data beside the repository")
    found = load(path)
    assert (found.reports[0].rows, found.reports[0].kept) == (rows, kept)
    assert all((p.tests is not None) == tested and bool(p.golds) != tested for p in found.prompts)


def test_gsm8k_train_and_test_share_what_a_person_would_call_a_repeat(root: Path) -> None:
    folder = root.parent / "shared" / "data"
    if not (folder / "gsm8k_train.jsonl").exists():
        pytest.skip("no gsm8k_train.jsonl: this test reads it from shared/data beside the repository")
    train, test = (load(folder / f"gsm8k_{part}.jsonl").prompts for part in ("train", "test"))
    index = EvalIndex({"gsm8k": test})
    # The split is clean but for phrases such as "at the same rate how many additional hours would ...".
    assert len(index.find(train)) < 10
    assert len(index.find(test)) == len(test)
