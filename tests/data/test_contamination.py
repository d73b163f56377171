"""Training prompts that repeat evaluation prompts are found, listed and dropped as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from or1.config import Config
from or1.data import load_problems
from or1.data.contamination import EvalIndex, Overlap, decontamination_lines
from tests.helpers.problem_rows import ask, load, write


def config(tmp_path: Path, **data: object) -> Config:
    return Config(run_dir=str(tmp_path / "run"), model={"path": "m"}, data=data, eval={"sets": data.pop("sets", ())})


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


def test_gsm8k_train_and_test_share_what_a_person_would_call_a_repeat(root: Path) -> None:
    folder = root.parent / "shared" / "data"
    if not (folder / "gsm8k_train.jsonl").exists():
        pytest.skip("no gsm8k_train.jsonl: this test reads it from shared/data beside the repository")
    train, test = (load(folder / f"gsm8k_{part}.jsonl").prompts for part in ("train", "test"))
    index = EvalIndex({"gsm8k": test})
    # The split is clean but for phrases such as "at the same rate how many additional hours would ...".
    assert len(index.find(train)) < 10
    assert len(index.find(test)) == len(test)
