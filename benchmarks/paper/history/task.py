r"""The task: sums of two numbers that mostly need a carry, and a model that knows three ways to write them down.

    47+85=<think></think>\boxed{132}                       direct
    47+85=<think>12;13</think>\boxed{132}                  terse: the column sums, from the right
    47+85=<think>7+5=12;4+8+1=13</think>\boxed{132}        verbose

A supervised start shows all three equally often, by a teacher who forgets eight carries in ten. So the model begins
with several valid paths for each problem, spread over them, and wrong for one reason that sampling can discover: it
has entropy to lose and accuracy to gain.
"""

# B problems of a batch, L tokens

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from benchmarks.lib.paths import ROOT

Problem = tuple[int, int]

STYLES = ("direct", "terse", "verbose")
LONGEST = 24  # tokens of the longest response, rounded up
SHORT = 12  # cuts what is verbose about two digits
HELD_OUT = 400
_FORGET = 0.8
_WITHOUT_CARRY = 0.2
_STEPS, _BATCH, _LR = 500, 128, 3e-3


def make_base(folder: Path) -> None:
    """Train the base model and write it to `folder` with train.jsonl and heldout.jsonl. Deterministic."""
    torch.manual_seed(0)
    rng = random.Random(0)
    problems = list(dict.fromkeys(_problem(rng) for _ in range(6000)))
    held_out, train = problems[:HELD_OUT], problems[HELD_OUT:]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny-adder")
    model = _model(tokenizer)
    _warm_up(model, tokenizer, train, rng)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, rows in (("train", train), ("heldout", held_out)):
        lines = [json.dumps({"question": f"{a}+{b}", "answer": str(a + b)}) for a, b in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def solution(a: int, b: int, style: str, rng: random.Random, forget: float) -> str:
    """Return a worked sum in one of STYLES; each carry is forgotten with probability `forget`."""
    columns, answer, carry, width = [], 0, 0, max(len(str(a)), len(str(b)))
    for i in range(width):
        digits = [a // 10**i % 10, b // 10**i % 10] + [1] * carry
        columns.append(f"{'+'.join(map(str, digits))}={sum(digits)}" if style == "verbose" else str(sum(digits)))
        answer += (sum(digits) if i == width - 1 else sum(digits) % 10) * 10**i
        carry = int(sum(digits) >= 10 and rng.random() >= forget)
    chain = "" if style == "direct" else ";".join(columns)
    return f"{chain}</think>\\boxed{{{answer}}}"


def _problem(rng: random.Random) -> Problem:
    """Return two numbers of one or two digits. Problems without a carry are drawn less often."""
    while True:
        a, b = (rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in (rng.randint(1, 2), rng.randint(1, 2)))
        carries = a % 10 + b % 10 >= 10 and max(a, b) >= 10
        if carries or rng.random() < _WITHOUT_CARRY:
            return a, b


def _model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).float()


def _warm_up(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], rng: random.Random
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS, eta_min=_LR / 20)
    for _ in range(_STEPS):
        ids_BL, labels_BL = _batch(rng.choices(problems, k=_BATCH), tokenizer, rng)
        optimizer.zero_grad()
        model(ids_BL, labels=labels_BL).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _batch(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded ids and labels; only the solution is trained."""
    rows = []
    for a, b in problems:
        prompt = tokenizer.encode(f"{a}+{b}=<think>")
        text = solution(a, b, rng.choice(STYLES), rng, _FORGET)
        rows.append((prompt, tokenizer.encode(text) + [tokenizer.eos_token_id]))
    width = max(len(p) + len(s) for p, s in rows)
    ids_BL = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels_BL = torch.full((len(rows), width), -100)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids_BL[i, :end] = torch.tensor(prompt + response)
        labels_BL[i, len(prompt) : end] = torch.tensor(response)
    return ids_BL, labels_BL
