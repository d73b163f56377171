"""What the tests of this folder share beside fixtures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor, nn

WORDS = 997


def word_tokenizer() -> Any:
    """Return a tokenizer with one token a word: w0, w1, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


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


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_training(got: Record, want: Record, rel: float = 1e-5) -> None:
    """Check that losses, gradient norms, entropies and parameters agree, and that the run learns.

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
    """Return |got - want| / |want| in the 2-norm; |got - want| where want is 0."""
    return float((got - want).norm() / want.norm().clamp(min=1e-30)) if bool(want.any()) else float(got.norm())
