r"""Make the checkpoint and the data in this folder: a tiny Qwen2 that adds numbers with a chain of thought, badly.

    python examples/tiny-adder/make.py [--out FOLDER] [--seed N]

The supervised warm-up shows worked additions by a teacher who forgets six carries in ten. The model learns the form,
the column sums, and that a carry is usually forgotten. Greedy decoding solves the problems without a carry. Sampling
sometimes gives a right chain, which reinforcement learning can reinforce.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

Problem = tuple[int, int]

MAX_DIGITS = 3
TARGET_ACCURACY = (0.30, 0.60)
TRAIN_PROBLEMS, HELD_OUT_PROBLEMS = 6000, 400
SPECIAL = ["<pad>", "<eos>"]
MARKS = ["<think>", "</think>", "\\boxed{"]
CHARACTERS = list("0123456789+=;}")
CHAT_TEMPLATE = "{{ messages[0]['content'] }}={% if add_generation_prompt %}<think>{% endif %}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, thinking tag and opening of the box."""
    vocab = {token: i for i, token in enumerate(SPECIAL + MARKS + CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def worked_solution(a: int, b: int, rng: random.Random, forget: float) -> str:
    r"""Return column sums from the right, then their answer: 47+85 -> 7+5=12;4+8+1=13</think>\boxed{132}

    Each carry is forgotten with probability `forget`.
    """
    columns, answer, carry, width = [], 0, 0, max(len(str(a)), len(str(b)))
    for i in range(width):
        digits = [a // 10**i % 10, b // 10**i % 10] + [1] * carry
        columns.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        answer += (sum(digits) if i == width - 1 else sum(digits) % 10) * 10**i
        carry = int(sum(digits) >= 10 and rng.random() >= forget)
    return f"{';'.join(columns)}</think>\\boxed{{{answer}}}"


def sample_problem(rng: random.Random) -> Problem:
    """Return two operands. Their lengths are uniform, so long problems are as common as short ones."""
    digits = [rng.randint(1, MAX_DIGITS) for _ in range(2)]
    a, b = (rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in digits)
    return a, b


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a Qwen2 of 0.55 M parameters: 3 layers, hidden 128, grouped-query attention, tied embeddings."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=344,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).float()


def batch_of(
    problems: list[Problem], tokenizer: PreTrainedTokenizerFast, rng: random.Random, forget: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded ids and labels; only the solution is trained."""
    rows = []
    for a, b in problems:
        prompt = tokenizer.encode(f"{a}+{b}=<think>")
        rows.append((prompt, tokenizer.encode(worked_solution(a, b, rng, forget)) + [tokenizer.eos_token_id]))
    width = max(len(p) + len(s) for p, s in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, solution) in enumerate(rows):
        ids[i, : len(prompt) + len(solution)] = torch.tensor(prompt + solution)
        labels[i, len(prompt) : len(prompt) + len(solution)] = torch.tensor(solution)
    return ids, labels


@torch.no_grad()
def greedy_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> float:
    """Return the share of problems whose box holds the sum, with greedy decoding."""
    model.eval()
    prompts = [f"{a}+{b}=<think>" for a, b in problems]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=64
    )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return sum(f"\\boxed{{{a + b}}}" in text for (a, b), text in zip(problems, texts, strict=True)) / len(problems)


def warm_up(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, held_out: list[Problem]
) -> None:
    """Train on fresh problems, none of them held out, with a cosine learning rate."""
    rng = random.Random(args.seed + 1)
    seen = {frozenset(p) for p in held_out}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps, eta_min=args.lr / 20)
    for step in range(1, args.steps + 1):
        problems = [p for p in (sample_problem(rng) for _ in range(args.batch)) if frozenset(p) not in seen]
        ids, labels = batch_of(problems, tokenizer, rng, args.forget)
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            accuracy = greedy_accuracy(model, tokenizer, held_out)
            print(f"step {step}: loss {loss.item():.4f}, greedy accuracy {accuracy:.1%}", flush=True)


def write_problems(path: Path, problems: list[Problem]) -> None:
    """Write one JSON object a line, with question and answer."""
    path.write_text("".join(json.dumps({"question": f"{a}+{b}", "answer": str(a + b)}) + "\n" for a, b in problems))


def main() -> None:
    """Train, check the accuracy, write checkpoint and data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--forget", type=float, default=0.6, help="share of carries that the teacher forgets")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    unique: dict[frozenset[int], Problem] = {}
    while len(unique) < TRAIN_PROBLEMS + HELD_OUT_PROBLEMS:
        problem = sample_problem(rng)
        unique.setdefault(frozenset(problem), problem)
    problems = list(unique.values())
    rng.shuffle(problems)
    held_out, train = problems[:HELD_OUT_PROBLEMS], problems[HELD_OUT_PROBLEMS:]

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    warm_up(model, tokenizer, args, held_out)
    accuracy = greedy_accuracy(model, tokenizer, held_out)
    low, high = TARGET_ACCURACY
    if not low <= accuracy <= high:
        raise SystemExit(f"greedy accuracy is {accuracy:.1%}, not {low:.0%} to {high:.0%}; change --steps or --forget")

    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_problems(args.out / "train.jsonl", train)
    write_problems(args.out / "heldout.jsonl", held_out)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"greedy held-out accuracy {accuracy:.1%}, {model.num_parameters():,} parameters, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
