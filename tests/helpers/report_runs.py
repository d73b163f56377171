"""Synthetic runs for the report, and a parser of its page."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from or1.config import Config
from or1.report.page import write_report

STAGES = (
    {"steps": 24, "max_response_tokens": 96, "prompts_per_step": 16, "group_size": 8},
    {"steps": 36, "max_response_tokens": 192, "prompts_per_step": 16, "group_size": 8},
)
ALPHABET = [chr(code) for code in range(32, 127)] + ["\n", "<eos>"]


def make_config(run_dir: Path, stages=STAGES, sets=("heldout", "hard")) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"path": str(run_dir / "model"), "dtype": "float32"},
            "data": {"train": ["train.jsonl"], "prompt_suffix": " Answer in \\boxed{}."},
            "loss": {"entropy": {"control": "adaptive"}},
            "stage": list(stages),
            "eval": {
                "every_steps": 12,
                "sets": [{"name": name, "path": f"{name}.jsonl", "samples": 4} for name in sets],
            },
        }
    )


def make_record(config: Config, step: int, rng: random.Random) -> dict:
    """Return one plausible line: reward rises on a logistic curve, length grows, entropy settles at its target."""
    total = config.total_steps
    stage = 0 if step <= config.stage[0].steps else len(config.stage) - 1
    skill = 0.3 + 0.5 / (1 + math.exp(-8 * (step / max(total, 1) - 0.4)))
    record = {"step": step, "stage": stage, "time": 1.75e9 + 5.0 * step}
    if step:
        record |= _training_metrics(config, step, stage, skill, rng)
    if step % config.eval.every_steps == 0 or step == total:
        for order, each in enumerate(config.eval.sets):
            accuracy = skill * (1 - 0.4 * order)
            key = f"eval/{each.name}"
            record |= {
                f"{key}/avg@4": accuracy,
                f"{key}/avg@4_ci95": 0.03,
                f"{key}/pass@4": min(1, accuracy + 0.12),
                f"{key}/len_mean": 50 + step / 2,
                f"{key}/truncated": 0.02,
                "time/eval": 2.5,
            }
    return record


def _training_metrics(config: Config, step: int, stage: int, skill: float, rng: random.Random) -> dict:
    limit = config.stage[stage].max_response_tokens
    reward = min(max(skill + rng.gauss(0, 0.04), 0), 1)
    truncated = abs(rng.gauss(0.08, 0.02)) * (1 - skill)
    rest = (1 - reward - truncated) / 2
    solved, failed = reward**4, (1 - reward) ** 4
    times = {"rollout": 2.2 + rng.random() * 0.4, "reward": 0.4, "train": 1.3 + rng.random() * 0.2, "sync": 0.1}
    return {
        "reward/mean": reward,
        "reward/status/ok": reward,
        "reward/status/wrong": rest * 1.6,
        "reward/status/no_answer": rest * 0.4,
        "reward/status/crash": 0.0,
        "reward/status/truncated": truncated,
        "reward/status/timeout": 1 / 128 if step == 7 else 0.0,
        "group/frac_zero_std": solved + failed,
        "group/solved": solved,
        "group/failed": failed,
        "group/kept": round(16 * (1 - solved - failed)),
        "completion/len_mean": limit * (0.4 + 0.1 * skill) + rng.gauss(0, 2),
        "completion/len_max": limit * min(1, 0.9 + rng.random() * 0.2),
        "completion/truncated": truncated,
        "policy/entropy": 0.2 + 0.3 * math.exp(-step / 10) + rng.gauss(0, 0.015),
        "policy/entropy_coef": min(5e-3, 1e-4 * step) * (step % 3 > 0),
        "policy/clip_frac": 0.0,
        "mismatch/kl": 1e-6 * math.exp(rng.gauss(0, 0.5)),
        "optim/loss": rng.gauss(0, 0.02),
        "optim/grad_norm": 0.3 * math.exp(rng.gauss(0, 0.3)),
        "optim/lr": 1e-6,
        "optim/updates": 1,
        "optim/skipped": 0,
        "perf/tokens_per_s": 2400 + rng.gauss(0, 60),
        "perf/peak_mem_gib": 1.4,
        **{f"time/{name}": value for name, value in times.items()},
        "time/step": sum(times.values()) + 0.1,
    }


def make_rollout(run_dir: Path, step: int, attack: str = "") -> None:
    """Four responses with different fates, encoded by the character tokenizer of `make_tokenizer`."""
    rng = random.Random(step)
    thought = "First add the ones: 7+5=12, write 2, carry 1.\nThen the tens: 4+3+1=8.\nSo the sum is 82. "
    fates = [
        (thought + "\\boxed{82}" + attack, "ok", "stop"),
        (thought[:40] + "\\boxed{72}", "wrong", "stop"),
        (thought * 2, "truncated", "length"),
        ("no idea", "no_answer", "stop"),
    ]
    rows = []
    for text, status, finish in fates:
        ids = [ALPHABET.index(char) for char in text] + ([ALPHABET.index("<eos>")] if finish == "stop" else [])
        logp = [-rng.expovariate(6) * (12 if rng.random() < 0.08 else 1) for _ in ids]
        rows.append(
            {
                "step": step,
                "stage": 0,
                "prompt_id": "train.jsonl:17",
                "source": "train.jsonl",
                "prompt": "What is 47 + 35?" + attack,
                "golds": ["82" + attack],
                "response": text,
                "token_ids": ids,
                "logp": logp,
                "reward": float(status == "ok"),
                "status": status,
                "finish": finish,
                "version": step - 1,
                "advantage": 1.5 if status == "ok" else -0.5,
                "kept": True,
            }
        )
    path = run_dir / "rollouts" / f"step_{step}.parquet"
    path.parent.mkdir(exist_ok=True)
    schema = pa.Table.from_pylist(rows[:1]).schema
    schema = schema.set(schema.get_field_index("token_ids"), pa.field("token_ids", pa.list_(pa.int32())))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({char: i for i, char in enumerate(ALPHABET)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def make_run(run_dir: Path, steps: int = 60, attack: str = "", stages=STAGES, rollouts=(1, 30, 60)) -> Path:
    """Write a run directory as the trainer leaves it."""
    run_dir.mkdir()
    config = make_config(run_dir, stages)
    (run_dir / "config.resolved.json").write_text(config.model_dump_json())
    rng = random.Random(0)
    lines = [json.dumps(make_record(config, step, rng)) for step in range(steps + 1)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    make_tokenizer(run_dir / "model")
    for step in rollouts:
        make_rollout(run_dir, step, attack)
    return run_dir


class Page(HTMLParser):
    """Tags, attributes and text of a page, and a check that every tag is closed in order."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(run_dir: Path) -> tuple[str, Page]:
    html = write_report(run_dir).read_text(encoding="utf-8")
    return html, Page(html)


def make_graded(run_dir: Path, steps: int = 24) -> Path:
    """Write a run whose rewards lie between -0.1 and 0.6; hardly any response is solved."""
    make_run(run_dir, steps=steps, rollouts=(1,))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        mean = -0.1 + 0.5 * line["step"] / steps
        if line["step"]:
            line |= {"reward/mean": mean, "reward/graded": 0.9, "reward/p10": mean - 0.1, "reward/p90": mean + 0.2}
            line |= {"reward/status/ok": 0.8, "group/solved": 0.0}
        for name in ("heldout", "hard"):
            if f"eval/{name}/avg@4" in line:
                line |= {
                    f"eval/{name}/avg@4": 0.025,
                    f"eval/{name}/reward_mean": mean,
                    f"eval/{name}/reward_mean_ci95": 0.02,
                }
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = run_dir / "rollouts" / "step_1.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0] |= {"reward": 0.183, "status": "ok"}
    pq.write_table(pa.Table.from_pylist(rows), path)
    return run_dir
