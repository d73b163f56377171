"""The tiny-adder checkpoint and its data, for the other examples in this folder."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[1] / "tiny-adder"


def model_and_tokenizer() -> tuple[Any, Any]:
    """Return a Qwen2 of 0.5 M parameters that adds numbers, in fp32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32), tokenizer


def problems(count: int) -> list[dict[str, str]]:
    """Return the first `count` questions and answers of the training file."""
    with (FOLDER / "train.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
