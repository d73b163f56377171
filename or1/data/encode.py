"""A question or messages -> token ids, through the tokenizer's chat template if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from or1.data.rows import RowError
from or1.data.schemas import clean, filled

Messages = tuple[dict[str, str], ...]


class Encoded(NamedTuple):
    """The question as text, as messages, and as i32 token ids that end where the response begins."""

    text: str
    messages: Messages
    token_ids: np.ndarray


class Encoder:
    """Question or messages -> Encoded; raises RowError.

    tokenizer  a transformers tokenizer, or None where the server that generates has its own: then there are no ids
    suffix     put after the last user message, as it is
    """

    def __init__(self, tokenizer: Any, suffix: str):
        self._tokenizer, self._suffix = tokenizer, suffix
        self._template_errors: tuple[type[Exception], ...] = ()
        if tokenizer is not None and tokenizer.chat_template:
            from jinja2 import TemplateError

            self._template_errors = (TemplateError, KeyError, TypeError, ValueError)

    def __call__(self, prompt: Any, column: str) -> Encoded:
        messages = self._messages(prompt, column)
        text = "\n\n".join(message["content"] for message in messages)
        if self._tokenizer is None:
            return Encoded(text, tuple(messages), np.empty(0, dtype=np.int32))
        if self._tokenizer.chat_template:
            ids = self._apply_template(messages)
        elif len(messages) == 1:
            ids = self._encode(text)
        else:
            raise RowError(f"{len(messages)} messages, but the tokenizer has no chat template")
        if not ids:
            raise RowError(f"column {column!r} has no tokens")
        return Encoded(text, tuple(messages), np.asarray(ids, dtype=np.int32))

    def _messages(self, prompt: Any, column: str) -> list[dict[str, str]]:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(prompt, list) or not all(isinstance(message, Mapping) for message in prompt):
            raise RowError(f"column {column!r} is neither text nor a list of messages")
        messages = [{"role": message.get("role"), "content": message.get("content")} for message in prompt]
        if not all(isinstance(value, str) for message in messages for value in message.values()):
            raise RowError(f"a message in column {column!r} lacks a role or content, or it is not text")
        last = next((message for message in reversed(messages) if message["role"] == "user"), None)
        if last is None:
            raise RowError(f"column {column!r} has no user message")
        for message in messages:
            clean(message["content"], f"column {column!r}")
        last["content"] = filled(last["content"], f"column {column!r}") + self._suffix
        return messages

    def _apply_template(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            # transformers 5 returns a BatchEncoding unless told not to.
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except self._template_errors as error:
            raise RowError(f"the chat template refuses it: {error}") from error

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        if ids and ids[-1] == self._tokenizer.eos_token_id and not text.endswith(self._tokenizer.eos_token):
            return ids[:-1]
        return ids
