"""GSM8K by `or1 eval` and by lm-evaluation-harness: `python -m benchmarks.evaluation OUT --model DIR --data FILE`.

Needs the packages lm-eval and accelerate. Both sides get the same prompts, in fp32 and greedy, and their responses and
verdicts are compared row by row. Writes evaluation.json and README.md without any text of the data, and responses.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

# Before any Hugging Face library is imported: nothing here may be looked up in the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from benchmarks.evaluation.harness import Answered, Setting, by_harness, by_or1, graded
from benchmarks.evaluation.page import write_page
from benchmarks.evaluation.ties import explain
from benchmarks.lib.results import write_json
from or1.config.reward import RewardConfig
from or1.core.types import Score
from or1.reward import math as maths

SUFFIX = "\nReason step by step, and put your final answer within \\boxed{}."


def verdict_of_math(text: str, golds: tuple[str, ...]) -> bool:
    """Return or1's verdict on a text, as its maths reward computes it."""
    found = maths.screen(text, golds, require_think_close=RewardConfig().require_think_close)
    return found.reward >= 1 if isinstance(found, Score) else maths.equivalent(found, golds)


def compare(ours: list[Answered], theirs: list[Answered], golds: list[str]) -> list[dict[str, Any]]:
    """Return a row a problem: whether prompt and response are the same, both texts, and all verdicts on both."""
    regraded = [graded([a.text for a in side], golds) for side in (ours, theirs)]
    rows = []
    for i, (a, b, gold) in enumerate(zip(ours, theirs, golds, strict=True)):
        answer = gold.rpartition("#### ")[2].strip()
        verdicts = {
            "or1": a.verdicts | {name: values[i] for name, values in regraded[0].items()},
            "lm_eval": b.verdicts | {"math-verify": verdict_of_math(b.text, (answer,))},
        }
        recomputed = {name: values[i] for name, values in regraded[1].items()}
        if any(recomputed[name] != b.verdicts[name] for name in recomputed):
            raise ValueError(f"problem {i}: lm-eval's verdicts {b.verdicts} are not those computed here, {recomputed}")
        rows.append(
            {
                "problem": i,
                "gold": answer,
                "same_prompt": a.prompt == b.prompt,
                "same_response": a.text == b.text,
                "same_but_for_space": a.text.strip() == b.text.strip(),
                "verdicts": verdicts,
                "or1": a.text,
                "lm_eval": b.text,
            }
        )
    return rows


def without_texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with a hash of each response, since responses quote the problems, and without gold answers."""
    public = []
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in ("gold", "or1", "lm_eval")}
        for side in ("or1", "lm_eval"):
            kept[f"{side}_sha256"] = hashlib.sha256(row[side].strip().encode()).hexdigest()
        public.append(kept)
    return public


def main() -> None:
    """Evaluate with both, compare, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a model with a chat template")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of GSM8K: question, answer with ####")
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=20)
    given = parser.parse_args()
    setting = Setting(given.model, given.data.resolve(), given.problems, given.tokens, given.batch, SUFFIX)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = setting.data.read_text(encoding="utf-8").splitlines()[: setting.problems]
    golds = [json.loads(line)["answer"] for line in lines]
    with tempfile.TemporaryDirectory() as scratch:
        ours = by_or1(setting, Path(scratch))
        theirs, version = by_harness(setting)
    rows = compare(ours, theirs, golds)
    explain(setting, rows, ours)
    about = {
        "model": setting.model.resolve().name,
        "data": setting.data.name,
        "problems": setting.problems,
        "max_response_tokens": setting.tokens,
        "batch": setting.batch,
        "suffix": setting.suffix,
        "lm_eval": version,
        "math_verify": metadata.version("math-verify"),
    }
    write_json(given.out / "responses.json", rows, **about)
    write_json(given.out / "evaluation.json", without_texts(rows), **about)
    write_page(given.out / "README.md", rows, about)
    print((given.out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
