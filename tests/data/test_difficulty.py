"""Difficulty filters: counts of a named model, prompts with equal text, agreement of `or1 filter` and training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from or1.config import Config
from or1.data import DataError, DifficultyFilter, load_problems, load_prompts, times_solved
from or1.eval.difficulty import _counts
from or1.report.tables import print_difficulty
from tests.helpers.problem_rows import load, write


def rated(name: str, **counts: int | str | None) -> dict:
    return {
        "prompt": [{"role": "user", "content": name}],
        "reward_model": {"ground_truth": "1"},
        "extra_info": {"index": 0, "model_difficulty": counts},
    }


def test_difficulty_of_a_named_model_is_counted_and_its_absence_explained(tmp_path: Path) -> None:
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


def test_a_model_with_only_null_counts_is_not_listed(tmp_path: Path) -> None:
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
        print_difficulty(_counts(Counted(), 8).solved, settings.data.keep_difficulty, [])
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
