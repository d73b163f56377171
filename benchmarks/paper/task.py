r"""The task of the miniature study: three-digit sums by columns, in many valid ways, taught by someone who forgets.

    prompt    384+579=
    chain     13;8+7+1=16;3+5+1=9</think>\boxed{969}

Each column is written as its sum alone, or with its digits in either order: all are valid, so a policy that solves the
task need not be deterministic, and only the boxed number is rewarded. The teacher forgets most carries: problems with
two carries are solved by rare samples alone, and a policy whose entropy collapses before it has met them never learns
them. That is the report's exploration problem (section 4) on a model that trains in seconds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DIGITS = 3
FORGET = 0.7
"""Share of carries that the teacher forgets."""
ECHO = 0.5
"""Share of columns written with their digits."""
TRAIN_PROBLEMS, TEST_PROBLEMS = 4000, 256
WARM_UP_STEPS, WARM_UP_BATCH, WARM_UP_LR = 400, 192, 3e-3
SPECIAL = ["<pad>", "<eos>"]
MARKS = ["</think>", "\\boxed{"]
CHARACTERS = list("0123456789+=;}")

Problem = tuple[int, int]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, one each for the end of the thinking and the opening of the box."""
    vocab = {token: i for i, token in enumerate(SPECIAL + MARKS + CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """About 0.1 M parameters: 2 layers, hidden 64, tied embeddings."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=192, max_position_embeddings=64, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).float()


def chain(problem: Problem, rng: random.Random, forget: float) -> str:
    """A worked solution: each column in a way chosen by lot, each carry forgotten with probability `forget`."""
    a, b = problem
    columns, answer, carry = [], 0, 0
    for i in range(DIGITS):
        digits = [a // 10**i % 10, b // 10**i % 10]
        column = sum(digits) + carry
        if rng.random() < 0.5:
            digits.reverse()
        echo = "+".join(map(str, digits + [1] * carry)) + "=" if rng.random() < ECHO else ""
        columns.append(f"{echo}{column}")
        answer += (column if i == DIGITS - 1 else column % 10) * 10**i
        carry = int(column >= 10 and rng.random() >= forget)
    return f"{';'.join(columns)}</think>\\boxed{{{answer}}}"


def problems_of(count: int, rng: random.Random) -> list[Problem]:
    """Distinct problems of two numbers with DIGITS digits each."""
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    found: dict[Problem, None] = {}
    while len(found) < count:
        found[rng.randrange(low, high), rng.randrange(low, high)] = None
    return list(found)


def warm_up(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, banned: set[Problem], seed: int) -> None:
    """Supervised steps on the sloppy teacher's chains, none of them to a problem of the test set."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_UP_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, WARM_UP_LR, total_steps=WARM_UP_STEPS)
    for _ in range(WARM_UP_STEPS):
        problems = [p for p in problems_of(WARM_UP_BATCH, rng) if p not in banned]
        prompts = [tokenizer.encode(f"{a}+{b}=") for a, b in problems]
        chains = [tokenizer.encode(chain(p, rng, FORGET)) + [tokenizer.eos_token_id] for p in problems]
        width = max(map(len, chains)) + len(prompts[0])
        ids = torch.full((len(problems), width), tokenizer.pad_token_id)
        labels = torch.full((len(problems), width), -100)
        for row, (prompt, solution) in enumerate(zip(prompts, chains, strict=True)):
            ids[row, : len(prompt) + len(solution)] = torch.tensor(prompt + solution)
            labels[row, len(prompt) : len(prompt) + len(solution)] = torch.tensor(solution)
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def make(folder: Path, seed: int = 0) -> Path:
    """Write the warmed-up checkpoint, train.jsonl and test.jsonl into `folder`; returns it."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    problems = problems_of(TRAIN_PROBLEMS + TEST_PROBLEMS, rng)
    test, train = problems[:TEST_PROBLEMS], problems[TEST_PROBLEMS:]
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    warm_up(model, tokenizer, set(test), seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, rows in (("train", train), ("test", test)):
        lines = [json.dumps({"question": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
