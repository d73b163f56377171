"""One prompt as the model sees it: mistakes in templates and suffixes are seen here or nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from or1.core.types import Prompt

_MOST = 2000
"""Characters of a prompt that are shown."""


def prompt_lines(prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    """The first prompt decoded from its token ids, with the special tokens, for a person."""
    if not prompts:
        return []
    prompt = prompts[0]
    text = tokenizer.decode(prompt.token_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if len(text) > _MOST:
        # Both ends matter: what stands before the question, and where the response begins.
        cut = len(text) - _MOST
        text = f"{text[: _MOST // 2]} ... ({cut:,} more characters) ... {text[len(text) - _MOST // 2 :]}"
    lines = [f"first prompt as the model sees it ({prompt.id}, {len(prompt.token_ids):,} tokens):"]
    lines += [f"  | {line}" for line in text.split("\n")]
    if not tokenizer.chat_template:
        lines.append(
            "no chat template: plain text, as a base model continues it; a model that was taught to chat "
            "needs the chat_template of its tokenizer"
        )
    return lines
