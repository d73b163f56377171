"""Peak memory and time of TRL's GRPO pass, stock and patched: python -m benchmarks.step.trl_memory [--vocab V]

Each side runs in a process of its own. It scores one batch of completions with GRPOTrainer's method and differentiates
the result, with entropy gradient. Reports the growth of the resident set's peak during the pass. Needs trl and
datasets.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time


def measure(side: str, vocab: int, tokens: int) -> dict[str, float | str]:
    """Measure one side in this process. Return {"side", "trl", "extra_mib", "seconds"}."""
    import torch
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=4 * tokens,
        )
    )
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=tokenizer,
        args=trl.GRPOConfig(
            tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            entropy_coef=0.01,
            num_generations=2,
            per_device_train_batch_size=2,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 4}),
    )
    if side == "or1":
        from or1.integrations.trl import patch

        patch(trainer)

    def run(length: int) -> float:
        ids = torch.randint(2, vocab, (2, length + 4))
        begin = time.perf_counter()
        logps, entropies, *_ = trainer._get_per_token_logps_and_entropies(
            model, ids, torch.ones_like(ids), length, compute_entropy=True
        )
        (logps.mean() - 0.01 * entropies.mean()).backward()
        return time.perf_counter() - begin

    run(8)  # Allocates gradients and the libraries' own buffers before the measurement.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = run(tokens)
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"side": side, "trl": trl.__version__, "extra_mib": extra / 1024, "seconds": seconds}


def compare(vocab: int, tokens: int) -> dict[str, dict[str, float | str]]:
    """Measure both sides, each in a fresh process. Return results by side."""
    results = {}
    for side in ("stock", "or1"):
        command = [sys.executable, __file__, "--side", side, "--vocab", str(vocab), "--tokens", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
        results[side] = json.loads(done.stdout.splitlines()[-1])
    return results


def main() -> None:
    """Print one line a side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=2048, help="completion tokens of each of two sequences")
    parser.add_argument("--side", choices=["stock", "or1"], help="measure one side in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.vocab, arguments.tokens)))
        return
    print(f"vocabulary {arguments.vocab}, 2 x {arguments.tokens} completion tokens, fp32, policy pass and backward")
    for side, result in compare(arguments.vocab, arguments.tokens).items():
        print(f"  {side:5} (trl {result['trl']})  peak +{result['extra_mib']:7.0f} MiB   {result['seconds']:6.2f} s")


if __name__ == "__main__":
    main()
