"""Prompts whose texts differ and whose tokens do not: the model cannot tell them apart."""

from __future__ import annotations

import numpy as np

from or1.core.types import Prompt
from or1.data.duplicates import lost_text_lines


def prompt(line: int, text: str, *ids: int) -> Prompt:
    return Prompt(id=f"train.jsonl:{line}", source="train.jsonl", text=text, token_ids=np.array(ids, dtype=np.int32))


def test_texts_with_the_same_tokens_are_warned_about() -> None:
    (line,) = lost_text_lines([prompt(1, "abc", 7), prompt(2, "xyz", 7), prompt(3, "1", 8), prompt(4, "cab", 7)])
    assert "2 of 4 training prompts" in line
    assert "train.jsonl:2 those of train.jsonl:1" in line


def test_repeated_texts_white_space_and_prompts_without_tokens_are_not() -> None:
    same = [prompt(1, "a b", 7), prompt(2, "a b", 7), prompt(3, "a  b\n", 7), prompt(4, "c"), prompt(5, "d")]
    assert lost_text_lines(same) == []
