"""Files of problems, written and loaded with a tokenizer of single characters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from or1.data import PromptSet, load_prompts

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
VOCAB = {token: i for i, token in enumerate(["<eos>", "<bos>", "<unk>", "\n"] + [chr(c) for c in range(32, 127)])}


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    core = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


def load(
    *paths: Path,
    chat_template: str | None = None,
    max_prompt_tokens: int = 100,
    template_options: dict | None = None,
    **options,
) -> PromptSet:
    """Load files; `chat_template` is the tokenizer's, `template_options` are further arguments of `load_prompts`."""
    options |= template_options or {}
    return load_prompts(paths, make_tokenizer(chat_template), max_prompt_tokens=max_prompt_tokens, **options)


def write(path: Path, *rows: object) -> Path:
    """Write rows as JSONL; bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def golds_of(prompts: PromptSet) -> list[tuple[str, ...]]:
    return [p.golds for p in prompts.prompts]


def decoded(tokens: np.ndarray) -> str:
    return make_tokenizer().decode(tokens)


GOOD = {"question": "1+1=", "answer": "2"}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
