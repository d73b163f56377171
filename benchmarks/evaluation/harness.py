"""The two evaluations: `or1 eval`, and GSM8K's task in lm-evaluation-harness, read from a local file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from or1.commands.eval import run_evaluation
from or1.config import Config
from or1.config.load import load_config
from or1.data import load_eval_sets
from or1.eval.target import Target
from or1.model.load import load_tokenizer

STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
"""The patterns of the task gsm8k of lm-eval 0.4."""
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
"""What that task deletes from an extracted answer and from the gold answer before it compares them."""


@dataclass(frozen=True)
class Setting:
    """What both sides are given."""

    model: Path
    data: Path
    problems: int
    tokens: int
    batch: int
    suffix: str


@dataclass(frozen=True)
class Answered:
    """One problem: its prompt as token ids, the response as text, and the verdicts of the side's own graders."""

    prompt: tuple[int, ...]
    text: str
    verdicts: dict[str, bool]


def config_of(setting: Setting, out: Path) -> Config:
    """Return the config of `or1 eval`: greedy, fp32, zero-shot, the question as one chat message."""
    file = out / "or1.toml"
    file.write_text(
        f'run_dir = "{out}"\n[model]\npath = "{setting.model}"\ndtype = "float32"\ndevice = "cpu"\n'
        f"[rollout]\nbatch_size = {setting.batch}\n[data]\nmax_prompt_tokens = 1024\n"
        f"[eval]\nmax_response_tokens = {setting.tokens}\n"
        f'[[eval.sets]]\nname = "gsm8k"\npath = "{setting.data}"\ntemperature = 0.0\nlimit = {setting.problems}\n',
        encoding="utf-8",
    )

    return load_config(str(file), [f"data.prompt_suffix={json.dumps(setting.suffix)}"], "eval")


def by_or1(setting: Setting, out: Path) -> list[Answered]:
    """Return what `or1 eval` samples and how the maths verifier grades the responses."""
    config = config_of(setting, out)
    run_evaluation(Target(config, out / "or1"), fresh=True)
    rows = pq.read_table(out / "or1" / "transcripts" / "gsm8k.parquet").to_pylist()
    tokenizer = load_tokenizer(config.model.path)
    prompts = {p.id: p for p in load_eval_sets(config, tokenizer)["gsm8k"].prompts}
    return [
        Answered(
            tuple(int(t) for t in prompts[row["prompt_id"]].token_ids),
            row["response"],
            {"math-verify": row["reward"] >= 1},
        )
        for row in rows
    ]


def task(setting: Setting) -> dict[str, Any]:
    """Return lm-eval's task gsm8k with a local file, zero-shot, and the question as one chat message."""
    return {
        "task": "gsm8k_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(setting.data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}" + setting.suffix,
        "doc_to_target": "{{answer}}",
        "num_fewshot": 0,
        "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": setting.tokens},
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": list(IGNORED),
            }
        ],
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [{"function": "regex", "regex_pattern": STRICT}, {"function": "take_first"}],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": FLEXIBLE},
                    {"function": "take_first"},
                ],
            },
        ],
    }


def by_harness(setting: Setting) -> tuple[list[Answered], str]:
    """Return what lm-eval samples, how its two filters grade the responses, and its version."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(setting.model), dtype="float32", device="cpu", batch_size=setting.batch)
    found = lm_eval.simple_evaluate(
        model=model, tasks=[task(setting)], limit=setting.problems, apply_chat_template=True, log_samples=True
    )
    assert found is not None
    answered: dict[int, Answered] = {}
    for row in found["samples"]["gsm8k_local"]:
        prompt = (
            row["arguments"]["gen_args_0"]["arg_0"] if isinstance(row["arguments"], dict) else row["arguments"][0][0]
        )
        verdict = {row["filter"]: bool(row["exact_match"])}
        old = answered.get(row["doc_id"])
        if old is not None:
            old.verdicts.update(verdict)
        else:
            ids = tuple(model.tok_encode(prompt))
            answered[row["doc_id"]] = Answered(ids, row["resps"][0][0], verdict)
    return [answered[i] for i in sorted(answered)], lm_eval.__version__


def graded(texts: Sequence[str], golds: Sequence[str]) -> dict[str, list[bool]]:
    """Return the verdicts of lm-eval's two filters on texts, computed here so that both sides' texts can be graded."""
    found: dict[str, list[bool]] = {"strict-match": [], "flexible-extract": []}
    for text, gold in zip(texts, golds, strict=True):
        strict = re.findall(STRICT, text)
        loose = [next((group for group in groups if group), "") for groups in re.findall(FLEXIBLE, text)]
        found["strict-match"].append(bool(strict) and cleaned(strict[0].strip()) == cleaned(gold))
        found["flexible-extract"].append(bool(loose) and cleaned(loose[-1].strip()) == cleaned(gold))
    return found


def cleaned(text: str) -> str:
    """Return an answer without what lm-eval's task ignores."""
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()
