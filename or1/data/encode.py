"""Encoding of a question or chat messages as token ids, through the tokenizer's chat template if there is one."""

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
"""Seconds that a chat template may take for a short prompt; `_apply_template` adds time for long ones."""
_MESSAGES = re.compile(r"\s*\[\s*\{\s*\"")

Messages = tuple[dict[str, str], ...]


class Encoded(NamedTuple):
    """One question as text, as chat messages, and as token ids i32[L] that end where the response begins."""

    text: str
    messages: Messages
    token_ids: np.ndarray


class Encoder:
    """Converts a question, messages, or messages as JSON text to Encoded.

    tokenizer  a transformers tokenizer; None if the inference server has its own, and then there are no token ids
    suffix     appended verbatim to the last user message
    system     a system message for chats that have none; "" adds none
    template   arguments of the chat template

    Raises RowError for one unusable prompt, and DataError for a chat template that cannot encode any. A template that
    loops is stopped after TEMPLATE_LIMIT_S. The memory of a template is not limited.
    """

    def __init__(self, tokenizer: Any, suffix: str, system: str = "", template: Mapping[str, Any] | None = None):
        self._tokenizer, self._suffix, self._system = tokenizer, suffix, system
        self._template = dict(template or {})
        self._broken = ""
        if system and tokenizer is not None and not tokenizer.chat_template:
            raise DataError(
                f"data.system_prompt needs a chat template, and {self._name()} has none; remove the setting, or write "
                "the text into data.prompt_suffix"
            )

    def __call__(self, prompt: Any, column: str) -> Encoded:
        messages = self._messages(prompt, column)
        # The same system message in every prompt says nothing about a problem.
        said = [message["content"] for message in messages if message["content"] != self._system]
        text = "\n\n".join(said)
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
        has_system = any(message["role"] == "system" for message in messages)
        return messages if has_system or not self._system else [{"role": "system", "content": self._system}, *messages]

    def _apply_template(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError, TemplateSyntaxError

        if self._broken:
            raise DataError(self._broken)
        seconds = TEMPLATE_LIMIT_S + sum(len(message["content"]) for message in messages) / 1e5
        try:
            with _time_limit(seconds):
                # transformers 5 returns a BatchEncoding unless return_dict is False.
                ids: list[int] = self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self._template
                )
                return ids
        except _TooSlowError as error:
            self._broken = (
                f"the chat template of {self._name()} has not encoded one prompt after {seconds:.0f} s; it may loop "
                "without end, so mend the tokenizer's chat_template"
            )
            raise DataError(self._broken) from error
        except TemplateSyntaxError as error:
            self._broken = (
                f"the chat template of {self._name()} is not Jinja: {error.message} in line "
                f"{error.lineno}; mend the tokenizer's chat_template"
            )
            raise DataError(self._broken) from error
        except Exception as error:  # a template is code of a model's author and may raise anything
            cause = error if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise RowError(f"the chat template refuses it: {cause}") from error

    def _name(self) -> str:
        return repr(getattr(self._tokenizer, "name_or_path", "") or "the tokenizer")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        if ids and ids[-1] == self._tokenizer.eos_token_id and not text.endswith(self._tokenizer.eos_token):
            return ids[:-1]
        return ids


class _TooSlowError(Exception):
    """Expiry of the time limit of a chat template."""


def _messages_in(text: str) -> list[Any]:
    """Return the messages in a JSON text, or one user message with the text itself."""
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
    """Raise _TooSlowError in the block after `seconds`.

    No-op outside the main thread, which is the only thread that receives signals.
    """
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
        # An alarm that was set before the block continues with its remaining time.
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)
