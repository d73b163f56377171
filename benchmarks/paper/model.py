"""Tier B: the ladder with a one-layer Qwen2 that or1's Trainer trains; accuracy and entropy without sampling noise.

The base model learns the rungs and digits of the prior from samples; all seeds start from it. A seed fixes the order of
the prompts and the sampling. Accuracy is exact: the sum of the probabilities of all right responses. Entropy is that of
the next-token distributions along the right responses, weighted by the probability of their rung.

Legend: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from benchmarks.lib.paths import ROOT
from benchmarks.paper.arms import Arm
from benchmarks.paper.ladder import CLASSES, LENGTHS, RIGHT, RUNGS, VARIANTS, level, score
from or1.config import Config
from or1.core.types import Prompt, Response, Score, Status
from or1.reward.scorer import scored
from or1.rollout.collect import Rollout
from or1.train.build import Parts, build
from or1.trainer import Step, Trainer

PRIOR = (0.55, 0.28, 0.11, 0.042, 0.014, 0.004)
SKILL = (0.85, 0.8, 0.8, 0.8, 0.8, 0.8)
_LIMIT = 9  # tokens: rung, at most 6 digits, and a rest that shows a response without an end
_BASE_STEPS, _BASE_BATCH, _BASE_LR = 600, 256, 3e-3


def make_base(folder: Path, prior: Sequence[float] = PRIOR, steps: int = _BASE_STEPS) -> None:
    """Train the base model; write it, its tokenizer and train.jsonl to `folder`. Deterministic."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny-adder")
    model = _model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_BASE_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=_BASE_LR / 30)
    for _ in range(steps):
        rows = [(_prompt(rng), _text(rng, prior)) for _ in range(_BASE_BATCH)]
        ids_BL, labels_BL = _padded(rows, tokenizer)
        optimizer.zero_grad()
        model(ids_BL, labels=labels_BL).loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = [(c, j) for c in range(CLASSES) for j in range(VARIANTS)]
    rng.shuffle(prompts)
    lines = [json.dumps({"question": f"{c}+{j}", "answer": str(level(c))}) for c, j in prompts]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(arm: Arm, seed: int, lr: float, base: Path, run_dir: Path, every: int) -> dict[str, Any]:
    """Train one run, measured every `every` rollouts; return its series as `tabular.train` does. Removes run_dir."""
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    config = Config.model_validate(settings(arm, seed, lr, base, run_dir))
    with build(config, _Silent(), scorer=_LadderScorer()) as parts:
        trainer = _Measured(parts, every)
        trainer.run()
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [step for step in map(json.loads, lines) if step["step"] > 0]
    series = trainer.series | _means(steps, every)
    shutil.rmtree(run_dir)
    return {"arm": arm.name, "seed": seed, "series": {k: [round(x, 6) for x in v] for k, v in series.items()}}


def settings(arm: Arm, seed: int, lr: float, base: Path, run_dir: Path) -> dict[str, Any]:
    """Return the settings of `or1 train` for one run."""
    stage = {
        "steps": arm.rollouts,
        "max_response_tokens": _LIMIT,
        "prompts_per_step": arm.prompts,
        "minibatch_prompts": arm.minibatch,
        "reuse": arm.reuse,
        "group_size": arm.group,
    }
    return {
        "run_dir": str(run_dir),
        "seed": seed,
        "stage": [stage],
        "model": {"path": str(base), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(base / "train.jsonl")], "max_prompt_tokens": 16, "decontaminate": "off"},
        "rollout": {"engine": "hf", "batch_size": arm.prompts * arm.group},
        "reward": {"kind": "benchmarks.paper.ladder:score", "workers": 1},
        "loss": {"clip_high": arm.clip_high, "entropy": {**arm.entropy, "measure": arm.measure}},
        "optim": {"lr": lr * arm.lr_scale, "warmup_steps": 0, "max_tokens_per_rank": 16384},
        "checkpoint": {"every_steps": 10**6},
        "log": {"tensorboard": False, "rollouts_every_steps": 10**6},
    }


class _Measured(Trainer):
    """or1's Trainer, with a look at the weights before the first step and every `every` rollouts."""

    def __init__(self, parts: Parts, every: int):
        super().__init__(parts)
        self._every, self._rows = every, right_responses(parts.tokenizer)
        self.series: dict[str, list[float]] = {}
        self._look()

    def learn(self, step: Step, rollout: Rollout, *, replayed: bool = False) -> dict[str, float]:
        """Train on a rollout, then measure."""
        metrics = super().learn(step, rollout, replayed=replayed)
        if step.number % self._every == 0:
            self._look()
        return metrics

    def _look(self) -> None:
        for name, value in exact(self.policy.model, self._rows).items():
            self.series.setdefault(name, []).append(value)


@dataclass(frozen=True)
class Right:
    """All right strings of one prompt a class, also those of rungs too low for its level.

    ids_BL    i64[B, L], prompt, rung, digits, end of text, padding; row c * S + s is class c with rung s
    mask_BL   bool[B, L], True at the tokens of the response
    counts_B  f64[B], 1 where the rung solves the class
    """

    ids_BL: Tensor
    mask_BL: Tensor
    counts_B: Tensor


def right_responses(tokenizer: PreTrainedTokenizerBase) -> Right:
    """Return the strings whose probabilities make up the accuracy."""
    rows = [
        (f"{c}+{c % VARIANTS}=<think>", f"{s}" + str(RIGHT) * LENGTHS[s]) for c in range(CLASSES) for s in range(RUNGS)
    ]
    ids_BL, labels_BL = _padded(rows, tokenizer)
    solves = [float(s >= level(c)) for c in range(CLASSES) for s in range(RUNGS)]
    return Right(ids_BL, labels_BL != -100, torch.tensor(solves, dtype=torch.float64))


@torch.no_grad()
def exact(model: PreTrainedModel, rows: Right) -> dict[str, float]:
    """Return accuracy, entropy in nats a token, and mean probability of the top rung."""
    logp_BLV = model(input_ids=rows.ids_BL).logits[:, :-1].double().log_softmax(-1)
    mask_BL = rows.mask_BL[:, 1:]
    logp_BL = logp_BLV.gather(-1, rows.ids_BL[:, 1:, None])[..., 0] * mask_BL
    entropy_BL = -(logp_BLV.exp() * logp_BLV).sum(-1) * mask_BL
    first_B1 = mask_BL.double().argmax(1, keepdim=True)
    rung_B = logp_BL.gather(1, first_B1)[:, 0].exp()
    # The first token's entropy is the same in all rows of a class; the rest is weighted by the rung's probability.
    first_B = entropy_BL.gather(1, first_B1)[:, 0]
    entropy = first_B.sum() / RUNGS + (rung_B * (entropy_BL.sum(1) - first_B)).sum()
    tokens = CLASSES + (rung_B * (mask_BL.sum(1) - 1)).sum()
    return {
        "accuracy": float((logp_BL.sum(1).exp() * rows.counts_B).sum() / CLASSES),
        "entropy": float(entropy / tokens),
        "top": float(rung_B.view(CLASSES, RUNGS)[:, -1].mean()),
    }


def _means(steps: Sequence[Mapping[str, float]], every: int) -> dict[str, list[float]]:
    """Return the means of each `every` rollouts."""
    blocks = [steps[i : i + every] for i in range(0, len(steps), every)]
    keys = {"updates": "optim/updates", "clipped": "policy/clip_frac", "alpha": "policy/entropy_coef"}
    means = {name: [sum(s.get(key) or 0.0 for s in b) / len(b) for b in blocks] for name, key in keys.items()}
    means["bonus"] = [sum((s.get("policy/entropy_coef") or 0.0) > 0 for s in b) / len(b) for b in blocks]
    return means


def _prompt(rng: random.Random) -> str:
    return f"{rng.randrange(CLASSES)}+{rng.randrange(VARIANTS)}=<think>"


def _text(rng: random.Random, prior: Sequence[float]) -> str:
    s = rng.choices(range(RUNGS), prior)[0]
    wrong = "0123456"
    return str(s) + "".join(str(RIGHT) if rng.random() < SKILL[s] else rng.choice(wrong) for _ in range(LENGTHS[s]))


def _model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).float()


def _padded(rows: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return right-padded ids and labels of (prompt, response) rows; the response ends with the end of text."""
    pairs = [(tokenizer.encode(p), tokenizer.encode(r) + [tokenizer.eos_token_id]) for p, r in rows]
    width = max(len(p) + len(r) for p, r in pairs)
    ids_BL = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels_BL = torch.full((len(pairs), width), -100)
    for i, (p, r) in enumerate(pairs):
        ids_BL[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels_BL[i, len(p) : len(p) + len(r)] = torch.tensor(r)
    return ids_BL, labels_BL


class _LadderScorer:
    """A scorer in this process: the rule takes microseconds, so a reward process would cost more than it saves."""

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """Score one response."""
        value = 0.0 if response.truncated else score(response.text, prompt.golds[0])
        return scored(Score(value, Status.OK))

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


class _Silent:
    """A display that shows nothing."""

    def begin(self, step: int) -> None:
        """Do nothing."""

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Do nothing."""

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Return a function that shows nothing."""
        return partial(self.phase, name)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Do nothing."""

    def recall(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""
