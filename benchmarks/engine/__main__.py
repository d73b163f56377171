"""Speed of the embedded engine: `python -m benchmarks.engine OUT_DIR`.

Generates with a random model, now and as it was before, and requires equal samples: tokens and log-probs, bit for bit.
The time is CPU seconds of the process, best round. With one thread they are seconds of work; with more, waiting counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

# Before torch is imported, as in or1: spinning threads would also measure the machine's other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.engine.former import FormerEngine
from benchmarks.lib.measure import stamp
from or1.config import ModelConfig
from or1.core.types import Prompt, Response
from or1.model.attention import register
from or1.model.prepare import prepare_model
from or1.rollout.engine import Sampling
from or1.rollout.hf import HfEngine

# The shape of SmolLM2-135M.
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    # As peaked as a trained model, a nat or two for a token.
    "initializer_range": 0.12,
}
PROMPT_TOKENS = 48


class NoText:
    """A tokenizer's names of tokens, without texts."""

    pad_token_id, eos_token_id = 0, 2

    def batch_decode(self, ids: list[list[int]], **options: object) -> list[str]:
        """Return an empty text for each response."""
        return [""] * len(ids)


def random_model(dtype: torch.dtype, **shape: int) -> PreTrainedModel:
    """Return a random model of SmolLM2-135M's shape, changed by `shape`, with or1's attention and head."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | shape)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=register("sdpa"))
    return prepare_model(model, ModelConfig(path="random"), torch.device("cpu")).eval()


def compare(model: PreTrainedModel, prompts: int, samples: int, tokens: int, rounds: int) -> dict[str, object]:
    """Return CPU seconds of both engines and whether their samples are equal."""
    rng = np.random.default_rng(0)
    vocab = model.config.get_text_config().vocab_size
    asked = [
        Prompt(str(i), "made", "", rng.integers(3, vocab, PROMPT_TOKENS).astype(np.int32), ("0",))
        for i in range(prompts)
    ]
    sampling = Sampling(temperature=1.0, max_tokens=tokens, samples=samples, seed=1)
    row: dict[str, object] = {"dtype": str(model.dtype)[6:], "threads": torch.get_num_threads()}
    found: dict[str, dict[tuple[int, int], Response]] = {}
    for name, kind in (("former", FormerEngine), ("now", HfEngine)):
        engine = kind(model, NoText(), prompts * samples)  # type: ignore[arg-type]
        best = float("inf")
        for _ in range(rounds):
            began = time.process_time()
            found[name] = {(f.prompt, f.sample): f.response for f in engine.generate(asked, sampling)}
            best = min(best, time.process_time() - began)
        row[f"{name}_cpu_s"] = round(best, 2)
    row["tokens"] = sum(len(response.token_ids) for response in found["now"].values())
    row["same_tokens"] = _equal(found, "token_ids")
    row["same_bits"] = _equal(found, "logp")
    return row


def _equal(found: dict[str, dict[tuple[int, int], Response]], field: str) -> bool:
    pairs = ((getattr(found["former"][slot], field), getattr(now, field)) for slot, now in found["now"].items())
    return all(np.array_equal(*pair) for pair in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path, help="folder for engine.json")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds of each engine (default 2)")
    options = parser.parse_args(arguments)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        model = random_model(dtype)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rows.append(compare(model, prompts=16, samples=16, tokens=20, rounds=options.rounds))
            print(rows[-1], flush=True)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    out = options.out_dir / "engine.json"
    out.write_text(json.dumps({"stamp": stamp(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(out)
    return 0 if all(row["same_tokens"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
