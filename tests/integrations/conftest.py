"""Tiny models, tokenizers and data made in memory; a GRPO run that records what a comparison needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WORDS = 997


def word_tokenizer() -> Any:
    """One token a word: w0, w1, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   padding_side="left")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of two layers with random weights, saved: TRL loads its reference model by path."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=WORDS + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
        pad_token_id=0, bos_token_id=None, eos_token_id=1)
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            # Key biases start at 0 and hardly move: AdamW makes full steps of what is rounding in their gradient.
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Deterministic reward: the share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


@dataclass
class Record:
    """What a run left behind, step by step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    trainer: Any = None


@pytest.fixture
def grpo_run(tiny_qwen2: Path, tmp_path: Path) -> Callable[..., Record]:
    """Train five optimizer steps; `patch` is applied to the trainer before."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    def run(patch: Callable[[Any], Any] = lambda trainer: trainer, peft_config: Any = None, steps: int = 5,
            trainer_class: type | None = None, **settings: Any) -> Record:
        missing = settings.keys() - {f.name for f in dataclasses.fields(trl.GRPOConfig)}
        if missing:
            pytest.skip(f"trl {trl.__version__} has no {sorted(missing)}")
        prompts = [f"w{7 * i % WORDS} w{i} w{3 * i}" for i in range(24)]
        args = trl.GRPOConfig(**{
            "output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, "max_steps": steps,
            "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 10, "logging_steps": 1,
            "learning_rate": 2e-3, "save_strategy": "no", "gradient_checkpointing": False, "temperature": 0.9,
            "disable_tqdm": True, "log_level": "error", "seed": 3} | settings)
        torch.manual_seed(1)
        trainer = patch((trainer_class or trl.GRPOTrainer)(
            model=AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32), reward_funcs=even_ids,
            args=args, train_dataset=datasets.Dataset.from_dict({"prompt": prompts}), peft_config=peft_config,
            processing_class=word_tokenizer()))
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


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_training(got: Record, want: Record, rel: float = 1e-5) -> None:
    """Losses, gradient norms, entropies and parameters agree, and the run was one that learns something.

    A loss is compared on the scale of the advantages, which are about 1: on-policy its value is near 0.
    """
    assert len(got.losses) == len(want.losses) > 0 and len(got.grad_norms) == len(want.grad_norms) > 0
    assert got.losses == pytest.approx(want.losses, rel=rel, abs=rel * 0.3)
    assert got.grad_norms == pytest.approx(want.grad_norms, rel=rel)
    assert got.entropies == pytest.approx(want.entropies, rel=rel)
    assert min(want.grad_norms) > 1e-3
    for name, end in want.end.items():
        assert relative(got.end[name], end) <= rel, name
    assert max(relative(want.start[name], end) for name, end in want.end.items()) > 1e-3


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the 2-norm; |got - want| where want is 0."""
    return float((got - want).norm() / want.norm().clamp(min=1e-30)) if bool(want.any()) else float(got.norm())
