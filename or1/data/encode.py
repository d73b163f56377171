"""A question or messages -> token ids, through the tokenizer's chat template if it has one."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from or1.core.errors import DataError, RowError
from or1.data.schemas import clean, filled

TEMPLATE_LIMIT_S = 60.0
"""Seconds for a chat template and one prompt of no great length; see `_time_limit`."""
_MESSAGES = re.compile(r"\s*\[\s*\{\s*\"")

Messages = tuple[dict[str, str], ...]


class Encoded(NamedTuple):
    """The question as text, as messages, and as i32 token ids that end where the response begins."""

    text: str
    messages: Messages
    token_ids: np.ndarray


class Encoder:
    """Question or messages, or JSON text of messages -> Encoded.

    Raises RowError, and DataError for a chat template that no prompt can be put through. A template that loops is
    stopped after TEMPLATE_LIMIT_S; how much memory a template takes is not limited.

    tokenizer  a transformers tokenizer, or None where the server that generates has its own: then there are no ids
    suffix     put after the last user message, as it is
    """

    def __init__(self, tokenizer: Any, suffix: str):
        self._tokenizer, self._suffix = tokenizer, suffix
        self._broken = ""

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
        prompt = _messages_in(prompt) if isinstance(prompt, str) else prompt
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
        from jinja2 import TemplateError, TemplateSyntaxError

        if self._broken:
            raise DataError(self._broken)
        seconds = TEMPLATE_LIMIT_S + sum(len(message["content"]) for message in messages) / 1e5
        try:
            with _time_limit(seconds):
                # transformers 5 returns a BatchEncoding unless told not to.
                return self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
        except _TooSlowError as error:
            self._broken = (
                f"the chat template of {self._name()} has not put one prompt into tokens after "
                f"{seconds:.0f} s; it may loop without end, so mend the tokenizer's chat_template"
            )
            raise DataError(self._broken) from error
        except TemplateSyntaxError as error:
            self._broken = (
                f"the chat template of {self._name()} is not Jinja: {error.message} in line "
                f"{error.lineno}; mend the tokenizer's chat_template"
            )
            raise DataError(self._broken) from error
        except Exception as error:  # a template is code that came with a model, and may fail in any way
            cause = error if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise RowError(f"the chat template refuses it: {cause}") from error

    def _name(self) -> str:
        return repr(getattr(self._tokenizer, "name_or_path", "") or "the tokenizer")

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        if ids and ids[-1] == self._tokenizer.eos_token_id and not text.endswith(self._tokenizer.eos_token):
            return ids[:-1]
        return ids


class _TooSlowError(Exception):
    """The time limit passed."""


def _messages_in(text: str) -> list[Any]:
    """The messages that a text is JSON of, or one message that is the text."""
    if _MESSAGES.match(text):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found):
            return found
    return [{"role": "user", "content": text}]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TooSlowError in the block after `seconds`. Only the main thread can be interrupted; others run on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise _TooSlowError

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        # Whoever had set the alarm before gets the rest of it.
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)
