"""Why two greedy responses to the same prompt differ: the logits of the two tokens at which they part."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.evaluation.harness import Answered, Setting


@torch.no_grad()
def explain(setting: Setting, rows: list[dict[str, Any]], ours: list[Answered]) -> None:
    """Add "parted" to each row with different responses: token number, both tokens, and their logits' difference.

    The logits are those of transformers in fp64, one sequence at a time. The texts are tokenized again, so a token
    number may be off where a model wrote a word in pieces.
    """
    different = [(row, answer) for row, answer in zip(rows, ours, strict=True) if not row["same_but_for_space"]]
    if not different:
        return
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float64)
    for row, answer in different:
        sides = [tokenizer(row[side], add_special_tokens=False).input_ids for side in ("or1", "lm_eval")]
        shared = next((i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
        # A response that ends earlier ends with the end token.
        tokens = [side[shared] if shared < len(side) else tokenizer.eos_token_id for side in sides]
        ids = torch.tensor([[*answer.prompt, *sides[0][:shared]]])
        logits_V = model(input_ids=ids).logits[0, -1]
        row["parted"] = {
            "token": shared,
            "or1": tokenizer.decode([tokens[0]]),
            "lm_eval": tokenizer.decode([tokens[1]]),
            "logits_apart": float(logits_V[tokens[0]] - logits_V[tokens[1]]),
            "below_largest": float(logits_V.max() - logits_V[tokens].max()),
        }
