"""The three integration snippets of docs/drop-in.md run as printed; the examples run as scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.grpo import even_ids, word_tokenizer

pytestmark = pytest.mark.integrations


def snippet(root: Path, library: str) -> Any:
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "drop-in.md").read_text(encoding="utf-8"), flags=re.S)
    found = [b for b in blocks if f"or1.integrations.{library} " in b]
    assert len(found) == 1
    return compile(found[0], "drop-in.md", "exec")


def tiny(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_trl_snippet(root: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    args = trl.GRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=1,
        num_generations=2,
        report_to=[],
        per_device_train_batch_size=2,
        max_completion_length=4,
        save_strategy="no",
    )
    names = {
        "GRPOTrainer": trl.GRPOTrainer,
        "model": tiny(tiny_qwen2),
        "reward": even_ids,
        "args": args,
        "dataset": datasets.Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"]}),
        "tokenizer": word_tokenizer(),
    }
    exec(snippet(root, "trl"), names)
    assert names["trainer"].state.global_step == 1 and hasattr(names["model"], "_or1_settings")


def test_verl_snippet_and_overrides(root: Path) -> None:
    verl = pytest.importorskip("verl")
    exec(snippet(root, "verl"), {})
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.kernel import linear_cross_entropy

    import or1.integrations.verl as plugin

    assert linear_cross_entropy.linear_cross_entropy is plugin.linear_cross_entropy
    assert get_policy_loss_fn("magic") is plugin.policy_loss
    from omegaconf import OmegaConf

    config = OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml")
    overrides = re.findall(r"`(actor_rollout_ref\.[\w.]+)=", (root / "docs" / "drop-in.md").read_text(encoding="utf-8"))
    assert len(overrides) == 3
    for key in overrides:
        OmegaConf.select(config, key, throw_on_missing=False)
        parent, _, leaf = key.rpartition(".")
        assert leaf in OmegaConf.select(config, parent), key


def test_transformers_snippet(root: Path, tiny_qwen2: Path) -> None:
    ids = torch.randint(2, 900, (2, 7))
    names = {"model": tiny(tiny_qwen2), "input_ids": ids, "labels": ids.clone()}
    exec(snippet(root, "transformers"), names)
    assert names["model"].lm_head.weight.grad.abs().sum() > 0 and names["out"].log_probs.shape == (2, 6)


@pytest.mark.parametrize(
    ("name", "needs", "shows"),
    [
        ("plain_pytorch", "torch", r"step 120  reward 0\.[6-9]"),
        ("trl_grpo", "trl", r"step 4  reward"),
        ("transformers_sft", "accelerate", r"gradient norm \d"),
        ("verl_head", "verl", r"no logits: True"),
    ],
)
def test_examples_run(root: Path, name: str, needs: str, shows: str) -> None:
    pytest.importorskip(needs)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, f"examples/integrations/{name}.py"],
        cwd=root,
        env=env,
        timeout=220,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(shows, done.stdout), done.stdout


def test_peak_memory_is_lower() -> None:
    """The benchmark of TRL's pass at a large vocabulary, each side in a process of its own."""
    pytest.importorskip("trl")
    from benchmarks.step import trl_memory

    results = trl_memory.compare(vocab=65536, tokens=512)
    assert results["or1"]["extra_mib"] < 0.75 * results["stock"]["extra_mib"], results
