"""Tiny models, tokenizers and data made in memory; a GRPO run that records what a comparison needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.grpo import WORDS, Record, even_ids, parameters, word_tokenizer


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Qwen2 of two layers with random weights; TRL loads its reference model by path."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=WORDS + 2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            # Key biases start at 0 and hardly move: AdamW makes full steps of what is rounding in their gradient.
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def grpo_run(tiny_qwen2: Path, tmp_path: Path) -> Callable[..., Record]:
    """Train five optimizer steps; `patch` is applied to the trainer before."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    def run(
        patch: Callable[[Any], Any] = lambda trainer: trainer,
        peft_config: Any = None,
        steps: int = 5,
        trainer_class: type | None = None,
        **settings: Any,
    ) -> Record:
        missing = settings.keys() - {f.name for f in dataclasses.fields(trl.GRPOConfig)}
        if missing:
            pytest.skip(f"trl {trl.__version__} has no {sorted(missing)}")
        prompts = [f"w{7 * i % WORDS} w{i} w{3 * i}" for i in range(24)]
        args = trl.GRPOConfig(
            **{
                "output_dir": str(tmp_path),
                "report_to": [],
                "use_cpu": True,
                "bf16": False,
                "max_steps": steps,
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "max_completion_length": 10,
                "logging_steps": 1,
                "learning_rate": 2e-3,
                "save_strategy": "no",
                "gradient_checkpointing": False,
                "temperature": 0.9,
                "disable_tqdm": True,
                "log_level": "error",
                "seed": 3,
            }
            | settings
        )
        torch.manual_seed(1)
        trainer = patch(
            (trainer_class or trl.GRPOTrainer)(
                model=AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32),
                reward_funcs=even_ids,
                args=args,
                train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
                peft_config=peft_config,
                processing_class=word_tokenizer(),
            )
        )
        record = Record(start=parameters(trainer.model), trainer=trainer)
        inner = trainer.training_step

        def training_step(*arguments: Any, **kwargs: Any) -> Tensor:
            loss = inner(*arguments, **kwargs)
            record.losses.append(float(loss))
            return loss

        trainer.training_step = training_step
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        record.grad_norms = [float(entry["grad_norm"]) for entry in logs]
        record.entropies = [float(entry["entropy"]) for entry in logs if "entropy" in entry]
        record.end = parameters(trainer.model)
        return record

    return run
