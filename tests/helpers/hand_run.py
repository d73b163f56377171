"""A run whose numbers can be computed by hand: a policy of three tokens whose odds depend on nothing, in fp64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from or1.config import Config, DistConfig
from or1.core.types import Group, Prompt, Response, Score, Status
from or1.dist.watchdog import Watchdog
from or1.dist.world import SINGLE, join
from or1.magic import rollout_entropy as masked_entropy
from or1.magic.advantage import has_advantage
from or1.magic.entropy import rollout_entropy
from or1.magic.stages import Step
from or1.report.rank_display import RankDisplay
from or1.reward.scorer import Scorer
from or1.rollout.across_ranks import exchange
from or1.rollout.collect import Rollout
from or1.train.build import Parts, build
from or1.trainer import Trainer

ADDER = Path(__file__).resolve().parents[2] / "examples" / "tiny-adder"
EOS, ZERO, ONE = 1, 5, 6
HALVES = {ZERO: 0.5, ONE: 0.25, EOS: 0.25}
"""The policy: tokens with their probabilities. Its entropy is 1.5 log 2 = 1.0397 nats."""
ENTROPY = 1.5 * np.log(2)
STAGE = {"steps": 1, "max_response_tokens": 6, "prompts_per_step": 2, "group_size": 2}


def save_policy(folder: Path, odds: dict[int, float] = HALVES) -> Path:
    """Save a checkpoint that gives these tokens these probabilities after any context, and no others."""
    config = Qwen2Config(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=0.0,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Layers that add nothing to embeddings of ones, whose norm they are: every hidden state is a row of ones.
            weight.fill_(float("norm" in name or "embed" in name))
        model.lm_head.weight[:, 0] = -1000.0
        for token, p in odds.items():
            model.lm_head.weight[token, 0] = np.log(p)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ADDER / name, folder)
    return folder


def config_of(folder: Path, stages: Sequence[dict[str, Any]] = ({},), **sections: dict[str, Any]) -> Config:
    """Return the config of a run in `folder` on HALVES; stages and sections as in TOML, default STAGE."""
    model = folder / "model"
    if not model.exists():
        save_policy(model)
        rows = [{"question": question, "answer": "0"} for question in ("1+1", "1+2", "1+3")]
        (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    # A rate so small that the policy stays what it is, and no clipping of the gradient.
    base = {
        "model": {"path": str(model), "dtype": "float64", "device": "cpu"},
        "log": {"tensorboard": False},
        "data": {"train": [str(folder / "train.jsonl")]},
        "rollout": {"engine": "hf"},
        "optim": {"lr": 1e-15, "grad_clip": 1e9},
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base.keys() | sections.keys()}
    return Config.model_validate({"run_dir": str(folder / "run"), "stage": [STAGE | s for s in stages]} | merged)


def trainer_of(config: Config, scorer: Scorer | None = None) -> Trainer:
    """Return a trainer as `or1 train` makes it, with its `parts` and `display`, without a terminal.

    scorer  every response is wrong without one
    """
    display = RankDisplay(Watchdog(SINGLE, 60.0), None)
    parts = build(config, display, scorer=scorer or Unsolved())
    trainer = Trainer(parts)
    trainer.parts, trainer.display = parts, display
    return trainer


def run_of(config: Config, display: RankDisplay | None = None) -> Parts:
    """Run a config to its end with the scorer of `[reward]`. Return the parts of the run, which are closed."""
    with build(config, display or RankDisplay(Watchdog(SINGLE, 60.0), None)) as parts:
        assert Trainer(parts).run()
    return parts


def response(*tokens: int, entropy: float = 1.0, finish: str = "stop", text: str = "") -> Response:
    """Return a response whose every token has the log-probability -entropy according to the engine."""
    return Response(np.array(tokens, np.int32), np.full(len(tokens), -entropy, np.float32), finish, 0, text)


def group(rewards: Sequence[float], responses: Sequence[Response], name: str = "p") -> Group:
    """Return responses to one prompt with their rewards."""
    scores = tuple(Score(r, Status.OK if r else Status.WRONG) for r in rewards)
    return Group(Prompt(name, "s", "1+1", np.array([7, 8], np.int32), ("0",)), tuple(responses), scores)


def learn(trainer: Trainer, *groups: Group, step: int = 1) -> dict[str, float]:
    """Train one step of stage 1 on these groups and return its metrics."""
    chosen = Step(number=step, stage_index=0, stage=trainer.config.stage[0], seed=0)
    return trainer.learn(chosen, Rollout(list(groups), 0.0, 0.0), replayed=True)


class Unsolved:
    """A scorer for which every response is wrong; it keeps them."""

    remarks = ()

    def __init__(self) -> None:
        self.seen: list[Response] = []

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        self.seen.append(response)
        future: Future[Score] = Future()
        future.set_result(Score(0.0, Status.WRONG))
        return future


def uneven_groups() -> list[Group]:
    """Rank 0 of two has 2 tokens of 0.125 nats and a solved prompt with 2 of 4 nats, rank 1 has 6 of 0.5 nats."""
    return [
        group([1, 0], [response(ZERO, entropy=0.125)] * 2, "a"),
        group([1, 0], [response(ZERO, ONE, EOS, entropy=0.5)] * 2, "b"),
        group([1, 1], [response(ZERO, entropy=4.0)] * 2, "c"),
    ]


def entropies_on_two_ranks() -> dict[str, float]:
    """Return e_k on each of two ranks: the trainer's, `or1.magic.tensors`', and that of the rank alone."""
    groups = uneven_groups()
    with join(DistConfig(timeout_s=60), torch.device("cpu")) as world:
        mine = [groups[i] for i in world.share(len(groups))]
        whole = exchange(world, Rollout(mine, 0.0, 0.0), [g.prompt for g in groups], ()).groups
        kept, mine = ([g for g in some if has_advantage(g)] for some in (whole, mine))
        logp = torch.tensor(np.concatenate([r.logp for g in mine for r in g.responses]))
        return {
            "trainer": rollout_entropy(kept),
            "magic": masked_entropy(logp, torch.ones_like(logp)),
            "alone": rollout_entropy(mine),
        }
