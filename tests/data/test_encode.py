"""What becomes a prompt: chat templates, suffixes, special tokens, prompts that are too long."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from or1.data import DataError, encode, load_prompts, prompt_lines
from tests.helpers.problem_files import CHAT, GOOD, VOCAB, decoded, load, make_tokenizer, user, write


def test_without_a_chat_template_a_question_is_encoded_as_it_is(tmp_path: Path) -> None:
    prompt = load(write(tmp_path / "x.jsonl", GOOD), prompt_suffix=" Box it.").prompts[0]
    assert prompt.text == "1+1= Box it." and decoded(prompt.token_ids) == "1+1= Box it."
    assert prompt.token_ids.dtype == np.int32 and prompt.token_ids.ndim == 1


def test_with_a_chat_template_a_question_is_one_user_message(tmp_path: Path) -> None:
    prompt = load(write(tmp_path / "x.jsonl", GOOD), chat_template=CHAT, prompt_suffix="!").prompts[0]
    assert prompt.text == "1+1=!" and decoded(prompt.token_ids) == "[user]1+1=![assistant]"
    assert prompt.token_ids.dtype == np.int32 and prompt.token_ids.ndim == 1


def test_the_suffix_follows_the_last_user_message(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, *user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    path = write(tmp_path / "x.jsonl", {"prompt": messages, "answer": "1"})
    prompt = load(path, chat_template=CHAT, prompt_suffix="!").prompts[0]
    assert decoded(prompt.token_ids) == "[system][user]a[assistant]b[user]c![assistant]"


def test_what_the_chat_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    tool = {"prompt": [*user("q"), {"role": "tool", "content": "x"}], "answer": "1"}
    path = write(tmp_path / "x.jsonl", {"prompt": user("q"), "answer": "1"}, tool)
    report = load(path, chat_template=CHAT, max_bad_fraction=0.5).reports[0]
    assert report.bad == ((2, "the chat template refuses it: no tools here"),)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "the chat template of 'the tokenizer' has not encoded one prompt after 0 s; it may loop"),
        ("{% for m in messages %}", "the chat template of 'the tokenizer' is not Jinja: .* in line 1; mend"),
    ],
)
def test_a_chat_template_that_loops_or_is_none_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr(encode, "TEMPLATE_LIMIT_S", 0.3)
    before = signal.getsignal(signal.SIGALRM)
    one, two = write(tmp_path / "x.jsonl", *[GOOD] * 99), write(tmp_path / "y.jsonl", GOOD)
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        load(one, two, chat_template=template, max_bad_fraction=1.0)
    # Once, not for every row or file.
    assert time.monotonic() - began < 20 and len(str(caught.value)) < 500
    assert signal.getsignal(signal.SIGALRM) == before


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[0]['content'].nothing() }}", "'str object' has no attribute 'nothing'"),
        ("{{ 'x' * 2 ** 62 }}", "(MemoryError|OverflowError): .*"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: .*"),
    ],
)
def test_however_a_chat_template_fails_it_costs_the_row_only(tmp_path: Path, template: str, reason: str) -> None:
    tool = {"prompt": [*user("q"), {"role": "tool", "content": "x"}], "answer": "1"}
    path = write(tmp_path / "x.jsonl", {"prompt": user("q"), "answer": "1"}, tool)
    broken = "{% if messages|length > 1 %}" + template + "{% endif %}" + CHAT
    report = load(path, chat_template=broken, max_bad_fraction=0.5).reports[0]
    assert [line for line, _ in report.bad] == [2]
    assert re.fullmatch(f"the chat template refuses it: {reason}", report.bad[0].reason)


def test_a_prompt_is_shown_as_the_model_sees_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"question": "1+1=\n?", "answer": "2"}, GOOD)
    tokenizer = make_tokenizer("<bos>" + CHAT)
    found = load_prompts([path], tokenizer, max_prompt_tokens=100).prompts
    assert prompt_lines(found, tokenizer) == [
        f"first prompt as the model sees it (x.jsonl:1, {len(found[0].token_ids)} tokens):",
        "  | <bos>[user]1+1=",
        "  | ?[assistant]",
    ]
    plain = make_tokenizer()
    lines = prompt_lines(load_prompts([path], plain, max_prompt_tokens=100).prompts, plain)
    assert lines[1:3] == ["  | 1+1=", "  | ?"] and lines[3].startswith("no chat template: plain text")
    long = write(tmp_path / "y.jsonl", {"question": "a" + "q" * 9998 + "z", "answer": "2"})
    shown = prompt_lines(load_prompts([long], plain, max_prompt_tokens=99999).prompts, plain)[1]
    assert shown.startswith("  | aqq") and shown.endswith("qz") and "(8,000 more characters)" in shown
    assert prompt_lines([], plain) == []


def test_bos_is_kept_and_eos_is_not_added(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", VOCAB["<bos>"]), ("<eos>", VOCAB["<eos>"])]
    )
    assert tokenizer("1")["input_ids"][-1] == tokenizer.eos_token_id
    prompt = load_prompts([write(tmp_path / "x.jsonl", GOOD)], tokenizer, max_prompt_tokens=9).prompts[0]
    assert prompt.token_ids.tolist() == [VOCAB[t] for t in ("<bos>", "1", "+", "1", "=")]


def test_over_long_prompts_are_counted_and_are_not_bad(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"question": "q" * n, "answer": "1"} for n in (9, 10, 11)))
    prompts = load(path, max_prompt_tokens=10, max_bad_fraction=0.0)
    assert [len(p.token_ids) for p in prompts.prompts] == [9, 10]
    assert (prompts.reports[0].over_long, prompts.reports[0].bad) == (1, ())
