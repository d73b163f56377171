"""Display of one encoded prompt, the only place where mistakes in chat templates and suffixes become visible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from or1.core.types import Prompt

_MOST = 2000
"""Maximum number of characters shown."""


def prompt_lines(prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    """Return lines that show the first prompt decoded from its token ids, special tokens included."""
    if not prompts:
        return []
    prompt = prompts[0]
    text = tokenizer.decode(prompt.token_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if len(text) > _MOST:
        # Both ends matter: the text before the question, and the place where the response begins.
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
